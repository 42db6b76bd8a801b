import codecs
import gzip
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_surgery.errors import TextError
from llama_surgery.text import encode, leading_tokens, read_text, read_texts, refuse_pipes, windows


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first: é", encoding="utf-8")
    (tmp_path / "c.md").write_text("not read", encoding="utf-8")
    assert read_texts(tmp_path) == ["first: é", "second"]
    assert read_texts(str(tmp_path / "b.txt")) == ["second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (codecs.BOM_UTF16_LE, "is empty"),
        (b"caf\xe9", r"not UTF-8 \(byte 3"),
        ("café".encode("utf-16-le"), "this is not text"),
        ("café".encode("utf-16-be"), "this is not text"),
        ("café".encode("utf-32-le"), "this is not text"),
        (b"a word\0and another", "this is not text"),
        (b"\x7fELF\x02\x01\x01\0\0\xff\xfe", "this is not text"),
        (codecs.BOM_UTF8 + b"a\0b", "this is not text"),
        (codecs.BOM_UTF8 + b"caf\xe9", r"not UTF-8 \(byte"),
        (codecs.BOM_UTF16_LE + b"a\0b", r"not UTF-16 \(byte"),
        (codecs.BOM_UTF16_LE + "a\0b".encode("utf-16-le"), "this is not text"),
        (gzip.compress(b"a book", mtime=0), r"gzip file: unpack it, or name <\(zcat"),
        (b"PK\x03\x04\x14\0", "a zip archive"),
        (b"%PDF-1.7\n", "a PDF"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(TextError, match=f"bad.txt.*{message}"):
        read_texts(tmp_path)


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_before_a_text_is_no_part_of_it(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße\r\nvon\rhier\n".encode(codec))
    assert read_texts(tmp_path) == read_texts(tmp_path / "a.txt") == ["Grüße\nvon\nhier\n"]
    big = {"utf-16": codecs.BOM_UTF16_BE, "utf-32": codecs.BOM_UTF32_BE}.get(codec)
    if big is not None:
        (tmp_path / "a.txt").write_bytes(big + "Grüße".encode(f"{codec}-be"))
        assert read_text(tmp_path / "a.txt") == "Grüße"


def test_a_pipe_is_read_by_its_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    book = "a long book. " * 20_000  # more than a pipe holds
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(book,))
    writer.start()
    assert read_texts(tmp_path / "pipe") == [book]
    writer.join()
    reading, writing = os.pipe()  # as the shell's <(…) hands it over
    os.write(writing, codecs.BOM_UTF8 + b"from a command")
    os.close(writing)
    assert read_texts(f"/dev/fd/{reading}") == ["from a command"]
    os.close(reading)
    with pytest.raises(TextError, match="a pipe, which only one process can read"):
        refuse_pipes(tmp_path / "pipe")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_is_refused(path: str) -> None:
    with pytest.raises(TextError, match=f"{path}: a device"):
        read_texts(path)


def test_what_a_folder_holds_besides_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    assert read_texts(tmp_path) == ["a text"]
    os.mkfifo(tmp_path / "pipe.txt")  # waiting for somebody to write would never end
    with pytest.raises(TextError, match=r"pipe\.txt: neither a file nor a folder"):
        read_texts(tmp_path)
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TextError, match=r"broken\.txt: no such file"):
        read_texts(tmp_path)


def test_paths_that_cannot_be_looked_at_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(TextError, match="cannot be read"):
            read_texts(path)
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(TextError, match="is a folder: give one text file"):
        read_text(tmp_path)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("iterdir", "read_bytes", "stat"):
        with monkeypatch.context() as patch, pytest.raises(TextError, match="Permission denied"):
            patch.setattr(Path, name, denied)
            read_texts(tmp_path)


def test_missing_path_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file or folder"):
        read_texts(tmp_path / "missing")
    with pytest.raises(TextError, match=r"no \.txt file"):
        read_texts(tmp_path)


def test_windows_are_disjoint_runs_of_one_document_taken_in_turn(tokenizer, texts) -> None:
    cut = windows(tokenizer, texts, 500, 30, seed=1)
    assert cut.shape == (30, 500)
    assert cut.dtype == torch.int64
    documents = [encode(tokenizer, text) for text in texts]
    places = []
    for window in cut.tolist():
        found = [
            (number, start)
            for number, ids in enumerate(documents)
            for start in range(len(ids) - 499)
            if ids[start] == window[0] and ids[start : start + 500] == window
        ]
        assert len(found) == 1
        places += found
    for number, start in places:
        assert not any(n == number and 0 < abs(s - start) < 500 for n, s in places)
    assert len(set(places)) == 30
    # Three windows already come from three documents.
    assert len({number for number, _ in places[:3]}) == 3


def test_windows_depend_on_the_seed_alone(tokenizer, texts) -> None:
    first = windows(tokenizer, texts, 256, 8, seed=1)
    assert torch.equal(first, windows(tokenizer, texts, 256, 8, seed=1))
    assert not torch.equal(first, windows(tokenizer, texts, 256, 8, seed=2))


def test_fewer_windows_are_the_first_of_more(tokenizer, texts) -> None:
    whole = windows(tokenizer, texts, 256, 40, seed=1)
    for count in (1, 2, 3, 4, 17):
        assert torch.equal(windows(tokenizer, texts, 256, count, seed=1), whole[:count])


def test_too_little_text_says_how_much_there_is_and_is_needed(tokenizer, texts) -> None:
    tokens = sum(len(encode(tokenizer, text)) for text in texts)
    with pytest.raises(TextError, match=rf"with {tokens} tokens hold \d+ whole ones, and 800000 tokens"):
        windows(tokenizer, texts, 8000, 100, seed=0)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (0, 3), (16, 0)])
def test_senseless_sizes_are_refused(tokenizer, texts, length: int, count: int) -> None:
    with pytest.raises(TextError, match="at least"):
        windows(tokenizer, texts, length, count, seed=0)


class _Words:
    """A tokenizer of words that puts 1 before and 2 behind a text."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [10 + len(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)


def test_first_token_of_the_tokenizer_begins_every_window(tokenizer) -> None:
    assert leading_tokens(tokenizer) == []
    assert leading_tokens(_Words()) == [1]
    cut = windows(_Words(), ["a bb ccc " * 20], 7, 5, seed=0)
    assert cut.shape == (5, 7)
    assert (cut[:, 0] == 1).all()
    assert (cut[:, 1:] > 10).all()

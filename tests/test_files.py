"""Atomic writes: complete or absent, and what was there before stays."""

import errno
import json
import os
import stat

import pytest

from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_atomically, write_json, write_together


def full_disk(*_arguments, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"b": [1.5, None], "a": "θ"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "θ", "b": [1.5, None]}
    assert [file.name for file in path.parent.iterdir()] == ["c.json"]


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    for text in ("one", "two, longer", "3"):
        write_atomically(path, lambda file, text=text: file.write_text(text))
        assert path.read_text() == text


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "ours", {})
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(
        SurgeryError, match=r"could not write .*file: No space left on device\. Nothing was changed"
    ):
        write_atomically(path, lambda file: file.write_text("new"))
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(file):
        file.write_text("half of the ne")
        full_disk()

    with pytest.raises(SurgeryError, match="No space left on device"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_another_exception_passes_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: file.write_text(str(1 // 0)))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(SurgeryError, match="could not write"):
        write_json(tmp_path / "file" / "config.json", {})
    assert (tmp_path / "file").read_text() == "old"


def test_a_path_that_is_a_folder_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SurgeryError, match=r"could not write .*folder"):
        write_json(tmp_path / "folder", {})
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SurgeryError, match="Permission denied"):
        write_json(tmp_path / "file", {})


def test_what_was_replaced_before_an_error_is_told(tmp_path, monkeypatch):
    one, two, replace = tmp_path / "one", tmp_path / "two", os.replace

    def failing(source, target):
        if target == two:
            full_disk()
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(SurgeryError, match=r"could not write .*two: .*one had been replaced before;"):
        write_together({one: lambda file: file.write_text("1"), two: lambda file: file.write_text("2")})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_json_has_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"high": float("inf"), "low": [1.5, float("nan")], "n": 3})
    assert json.loads((tmp_path / "a.json").read_text()) == {"high": None, "low": [1.5, None], "n": 3}

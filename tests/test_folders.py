"""What belongs to a model or to another library is never written over."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_json, write_together
from llama_surgery.folders import CONFIG_FILE, FINGERPRINT, FORMAT, TENSOR_FILE, check_folder


def fill(folder: Path, description: object = None, tensors: str | None = None) -> Path:
    """A folder with the files of an adapter, as they are given."""
    if description is not None:
        text = description if isinstance(description, str) else json.dumps(description)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    if tensors is not None:
        save_file({tensors: torch.zeros(2)}, folder / TENSOR_FILE)
    return folder


OWN = {"peft_type": FORMAT}
LORA = {"peft_type": "LORA", "base_model_name_or_path": "someone/model"}


@pytest.mark.parametrize(
    ("description", "tensors"),
    [
        (None, None),
        (OWN, FINGERPRINT),
        (None, FINGERPRINT),  # a write that was not finished
        (OWN, None),
        ("{damaged", FINGERPRINT),  # "Save it again", as loading says
        ("", FINGERPRINT),
    ],
)
def test_a_folder_of_ours_is_written_to(tmp_path: Path, description: object, tensors: str | None) -> None:
    assert check_folder(fill(tmp_path, description, tensors)) == tmp_path


def test_a_folder_of_ours_with_damaged_tensors_is_written_to(tmp_path: Path) -> None:
    fill(tmp_path, OWN)
    (tmp_path / TENSOR_FILE).write_bytes(b"cut off")
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("description", "tensors", "told"),
    [
        (LORA, "base.lora_A", "adapter_config.json"),
        (LORA, None, "adapter_config.json"),
        (LORA, FINGERPRINT, "adapter_config.json"),
        (None, "base.lora_A", "adapter_model.safetensors"),
        (OWN, "base.lora_A", "adapter_model.safetensors"),
        ("{damaged", None, "adapter_config.json"),
        ("{damaged", "base.lora_A", "adapter_config.json"),
        ("[]", FINGERPRINT, "adapter_config.json"),
        ({}, None, "adapter_config.json"),
    ],
)
def test_an_adapter_of_another_library_is_not_written_over(
    tmp_path: Path, description: object, tensors: str | None, told: str
) -> None:
    with pytest.raises(SurgeryError, match=f"another library .{told}.*give a folder of its own"):
        check_folder(fill(tmp_path, description, tensors))


@pytest.mark.parametrize("name", ["config.json", "adapter_model.bin", "pytorch_adapter.bin", TENSOR_FILE])
def test_a_file_that_cannot_be_ours_makes_a_folder_foreign(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / name).write_text("{}", encoding="utf-8")
    for folder in ("folder", "link"):
        with pytest.raises(SurgeryError, match=name):
            check_folder(tmp_path / folder)


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "broken"):
        with pytest.raises(SurgeryError, match="give a folder to write to"):
            check_folder(tmp_path / name)
    assert check_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(SurgeryError, match="Permission denied"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "adapter_config.json", "tokenizer.json", "model.safetensors", "old.bin", "learned.pt"],
)
def test_results_do_not_replace_files_of_models(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    with pytest.raises(SurgeryError, match=f"{name} is a file of a model or an adapter: it is not replaced"):
        write_json(tmp_path / name, {})
    assert (tmp_path / name).read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_results_may_lie_beside_a_model_under_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    write_json(tmp_path / "results.json", {"a": 1})
    write_json(tmp_path / "results.json", {"a": 2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 2}
    with pytest.raises(SurgeryError, match="would be taken for a part of the model there"):
        write_json(tmp_path / "adapter_config.json", {})


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target.json"
    for before in (None, "old"):
        if before is not None:
            target.write_text(before, encoding="utf-8")
        link = tmp_path / f"link-{before}"
        link.symlink_to(target)
        write_json(link, {"new": before})
        assert link.is_symlink() and json.loads(target.read_text()) == {"new": before}
    (tmp_path / "model.safetensors").write_text("theirs", encoding="utf-8")
    (tmp_path / "results.json").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(SurgeryError, match="is not replaced"):
        write_json(tmp_path / "results.json", {})


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(SurgeryError, match="a device or a pipe"):
            write_json(tmp_path / name, {})
    assert not Path("/dev/null").is_file()


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "one").write_text("old")
    with pytest.raises(SurgeryError, match=r"could not write .*two: No space left"):
        write_together({tmp_path / "one": lambda file: file.write_text("new"), tmp_path / "two": full})
    assert (tmp_path / "one").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["one"]

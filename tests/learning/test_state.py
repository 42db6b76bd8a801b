"""Checkpoints of learning: complete or absent, and only ever those of learning."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.learning.state import read_checkpoint, write_checkpoint


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path: Path) -> None:
    file, about = tmp_path / "checkpoint.pt", {"windows": 3}
    write_checkpoint(file, about, {"step": 1})
    with small_files(4096), pytest.raises(SurgeryError, match=r"could not write .*File too large"):
        write_checkpoint(file, about, {"step": 2, "corrections": torch.zeros(100_000)})
    assert read_checkpoint(file, about) == {"about": about, "step": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2], torch.zeros(3)])
def test_another_file_of_torch_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(SurgeryError, match="not a checkpoint of learning"):
        read_checkpoint(tmp_path / "model.pt", {"windows": 3})

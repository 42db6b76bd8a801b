"""Two processes learn as one would on the windows of both, and end alike."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.learning.test_trainer import SETTINGS, SPARSE, vector, windows
from tests.ports import free_port
from tests.surgery.tiny import build

from llama_surgery import SurgeryError
from llama_surgery.learning.processes import ALONE, launched
from llama_surgery.learning.trainer import Step, learn

pytest.importorskip("accelerate")

SHORT = dataclasses.replace(SETTINGS, steps=6)
#: Learns on one window, on two, and on one again, where nothing is left to do.
SCRIPT = """
import sys, torch
from pathlib import Path
from llama_surgery.learning.processes import launched
from llama_surgery.learning.trainer import learn
from tests.learning.test_processes import SHORT, SPARSE, build, vector, windows
torch.set_num_threads(1)
folder, processes, found = Path(sys.argv[1]), launched("cpu"), []
for count in (1, 2, 1):
    steps = []
    learned = learn(build("Llama", dtype=torch.float32), SPARSE, windows(count), SHORT, every_seconds=0,
                    checkpoint_file=folder / f"{count}.pt", progress=steps.append, processes=processes)
    found.append({"learned": vector(learned), "densities": [step.density for step in steps]})
torch.save(found, folder / f"rank-{processes.index}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote that ran the script together."""
    folder = tmp_path_factory.mktemp("together")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    shared["OMP_NUM_THREADS"] = "1"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, problem = process.communicate(timeout=240)
            assert process.returncode == 0, problem[-3000:]
    finally:
        for process in running:  # one would wait for ever for one that has failed
            process.kill()
    return folder


def together(folder: Path, number: int) -> list[dict]:
    """What both processes found in the run of that number."""
    return [torch.load(folder / f"rank-{rank}.pt")[number] for rank in range(2)]


def alone(ids: torch.Tensor) -> tuple[torch.Tensor, list[Step]]:
    steps: list[Step] = []
    return vector(
        learn(build("Llama", dtype=torch.float32), SPARSE, ids, SHORT, progress=steps.append)
    ), steps


@pytest.mark.timeout(300)
def test_two_on_the_same_window_learn_what_one_does(folder: Path) -> None:
    first, second = together(folder, 0)
    assert torch.equal(first["learned"], second["learned"])
    learned, steps = alone(windows(1))
    assert torch.allclose(first["learned"], learned, atol=1e-5)
    assert first["densities"] == pytest.approx([step.density for step in steps], rel=1e-4)
    assert not second["densities"]  # the main process alone reports
    again = together(folder, 2)  # the run is done: all read its checkpoint
    assert torch.equal(again[1]["learned"], second["learned"]) and not again[0]["densities"]
    with pytest.raises(SurgeryError, match="processes differ"):
        learn(
            build("Llama", dtype=torch.float32), SPARSE, windows(1), SHORT,
            checkpoint_file=folder / "1.pt",
        )  # fmt: skip


@pytest.mark.timeout(300)
def test_two_take_a_window_each(folder: Path) -> None:
    first, second = together(folder, 1)
    assert torch.equal(first["learned"], second["learned"])
    ids = windows(2)
    (one, steps), (other, others) = alone(ids[:1]), alone(ids[1:])
    mean = (steps[0].density + others[0].density) / 2
    assert first["densities"][0] == pytest.approx(mean, rel=1e-6)
    assert not torch.allclose(first["learned"], one) and not torch.allclose(first["learned"], other)


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() is ALONE and ALONE.main and ALONE.window(7, 3) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llama_surgery.learning.processes.find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="pip install accelerate"):
        launched()

"""Learning with the weights on disk: the result of learning in memory, within less memory than the model."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.learning.in_memory import local_errors
from tests.learning.test_trainer import SETTINGS, vector, windows
from tests.surgery.tiny import SPARSE, build
from transformers import LlamaConfig, LlamaForCausalLM

from llama_surgery import SurgeryError, UnsupportedModelError
from llama_surgery.learning.attach import Gates
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.state import first_state
from llama_surgery.learning.streaming import Captured, learn_streamed
from llama_surgery.learning.trainer import Step, fresh_corrections, frozen, run
from llama_surgery.learning.weights import Weights, skeleton
from llama_surgery.surgery.metric import metric_of

LOCAL = dataclasses.replace(SETTINGS, steps=6, parts=("channels", "tree"), sampled_tiles=2)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("Llama", dtype=torch.float32).save_pretrained(path)
    return path


def streamed(folder: Path, spill: Path, settings: LearningSettings = LOCAL, **options: object) -> tuple:
    return learn_streamed(
        skeleton(folder), Weights(folder), SPARSE, windows(3), settings, Captured(spill), **CPU, **options
    )


def learned_in_memory(seen: list[Step]) -> Corrections:
    """The steps of LOCAL by a model that is not streamed."""
    model, ids = build("Llama", dtype=torch.float32), windows(3)
    corrections = fresh_corrections(model, LOCAL, metric_of(model))
    state = first_state(corrections, LOCAL, math.log(SPARSE.theta), half=False)
    gates = Gates(corrections, SPARSE, state.price.log_theta, sampled_tiles=LOCAL.sampled_tiles)

    def measure(number: int) -> torch.Tensor:
        loss = local_errors(model, ids[number][None], gates).mean()
        (loss + state.price.value * gates.reading.soft_density()).backward()
        return loss.detach()

    options = {"checkpoint_file": None, "every_seconds": 0.0, "progress": seen.append}
    with frozen(model):
        run(measure, state, gates, ids, LOCAL, "local", "", **options)
    return corrections


def test_it_learns_at_the_density(folder: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    streamed(folder, tmp_path, dataclasses.replace(LOCAL, steps=60, parts=()), progress=steps.append)
    tail = [step.density for step in steps[-12:]]
    assert sum(tail) / len(tail) == pytest.approx(LOCAL.density, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_without_nan(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    learned, theta = learn_streamed(
        skeleton(folder),
        Weights(folder),
        SPARSE,
        windows(3),
        LOCAL,
        Captured(tmp_path),
        device=torch.device("cpu"),
        dtype=dtype,
    )
    assert torch.isfinite(vector(learned)).all() and vector(learned).abs().max() > 0 and theta > 0


def test_it_equals_learning_in_memory(folder: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    expected: list[Step] = []
    learned, theta = streamed(folder, tmp_path, progress=seen.append)
    in_memory = learned_in_memory(expected)
    torch.testing.assert_close(vector(learned), vector(in_memory), rtol=1e-5, atol=1e-6)
    assert vector(learned).abs().max() > 0.01 and theta == pytest.approx(expected[-1].theta)
    for ours, theirs in zip(seen, expected, strict=True):
        assert dataclasses.asdict(ours) | {"seconds": 0} == pytest.approx(
            dataclasses.asdict(theirs) | {"seconds": 0}, rel=1e-4
        )


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.step == 4:
            raise Killed

    file, counted = tmp_path / "checkpoint.pt", []
    options = {"checkpoint_file": file, "every_seconds": 0}
    with pytest.raises(Killed):
        streamed(folder, tmp_path, progress=kill, **options)
    (tmp_path / "00001-001.safetensors").unlink()  # as if it had been killed while the second window ran
    rest: list[Step] = []
    resumed, _ = streamed(
        folder, tmp_path, progress=rest.append, capturing=lambda *done: counted.append(done), **options
    )
    assert [step.step for step in rest] == [4, 5, 6] and counted == [(3, 3)]
    whole, _ = streamed(folder, tmp_path / "other")
    torch.testing.assert_close(vector(resumed), vector(whole), rtol=0, atol=0)


def test_states_of_other_windows_are_not_used(folder: Path, tmp_path: Path) -> None:
    one = dataclasses.replace(LOCAL, steps=1)
    streamed(folder, tmp_path, one)
    with pytest.raises(SurgeryError, match="another run \\(windows differ"):
        learn_streamed(skeleton(folder), Weights(folder), SPARSE, windows(2), one, Captured(tmp_path), **CPU)
    streamed(folder, tmp_path, dataclasses.replace(one, seed=3))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / folder.name)
    with pytest.raises(SurgeryError, match="another run \\(model differ"):
        streamed(tmp_path / folder.name, tmp_path, one)


def test_what_cannot_be_streamed_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no safetensors checkpoint"):
        Weights(tmp_path)
    with pytest.raises(UnsupportedModelError, match="holds no tensor"):
        Weights(folder).read(["model.nothing"])


#: Fails with MemoryError or a RuntimeError of PyTorch's allocator where more is allocated than is allowed.
LIMITED = """
import resource, sys, torch
from pathlib import Path
from tests.learning.test_streaming import CPU, LARGE, SPARSE, Captured, Weights, learn_streamed, skeleton
from tests.surgery.tiny import tokens
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
folder, spill, allowed, how = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ids = tokens(2, LARGE.length, seed=3)
used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
if how == "stream":
    learn_streamed(skeleton(folder), Weights(folder), SPARSE, ids, LARGE, Captured(spill), **CPU)
else:
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
print("done")
"""
LARGE = LearningSettings(density=0.15, length=128, steps=2, rate=0.1, sampled_tiles=1)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds what is mapped on Linux only")
def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="16MB")
    del model
    allowed = size // 3
    root = Path(__file__).parents[2]

    def run(how: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            LIMITED,
            str(tmp_path / "model"),
            str(tmp_path / "spill"),
            str(allowed),
            how,
        ]
        # One heap for all threads: how many there would be, and what they keep, is a matter of chance. So is
        # what a heap keeps of freed tensors, unless the size is fixed from which on they are given back.
        fixed = {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "262144",
            "MALLOC_TRIM_THRESHOLD_": "262144",
        }
        environment = os.environ | fixed
        return subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    streams, loads = run("stream"), run("load")
    told, problem = streams.communicate()
    assert streams.returncode == 0 and told.strip() == "done", problem[-2000:]
    loads.communicate()
    assert loads.returncode != 0

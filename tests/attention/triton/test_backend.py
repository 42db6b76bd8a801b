"""The kernels as a backend of the ordinary call: same model, same answers; refusals by name."""

import dataclasses
import os
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import llama_surgery as surgery
from llama_surgery.attention import executor
from llama_surgery.attention.impl import triton
from llama_surgery.attention.impl.triton import tuning
from llama_surgery.attention.impl.triton.helpers import launching
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

CONFIG = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.05)


def tiny(device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return LlamaForCausalLM(config).to(device).eval()


@pytest.mark.parametrize("summary", ["none", "page"])
def test_a_model_answers_as_with_gather(summary: str, device: torch.device) -> None:
    model = tiny(device)
    ids = torch.randint(64, (2, 59), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    logits, densities, texts = {}, {}, {}
    for backend in ("gather", "triton"):
        config = dataclasses.replace(CONFIG, summary=summary, theta_decode=None, backend=backend)
        with surgery.operated(model, config), torch.no_grad():
            logits[backend] = model(ids, attention_mask=mask).logits[mask.bool()]
            densities[backend] = surgery.statistics(model)
            texts[backend] = model.generate(ids[:1, :54], max_new_tokens=2, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(logits["triton"], logits["gather"], rtol=1e-4, atol=1e-4)
    assert densities["triton"] == densities["gather"]
    assert torch.equal(texts["triton"], texts["gather"])


def test_auto_takes_the_kernels_on_a_gpu_where_they_can_run(device: torch.device) -> None:
    q = torch.zeros(1, 1, 1, 16, device=device)
    kernels = "triton" if q.is_cuda else "gather"
    assert executor.backend_name(CONFIG, q, q, 8) == kernels
    assert executor.backend_name(CONFIG, q.double(), q.double(), 8) == "gather"
    assert executor.backend_name(CONFIG, q.requires_grad_(), q, 8) == kernels


@pytest.mark.parametrize("summary", ["none", "page"])
def test_a_model_learns_as_with_gather(summary: str, device: torch.device) -> None:
    model = tiny(device)
    ids = torch.randint(64, (1, 59), generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for backend in ("gather", "triton"):
        config = dataclasses.replace(CONFIG, backend=backend, summary=summary)
        model.zero_grad()
        with surgery.operated(model, config):
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_asked_for_by_name_it_never_falls_back(device: torch.device) -> None:
    named = dataclasses.replace(CONFIG, backend="triton")
    on_cpu, q = (torch.zeros(1, 1, 1, 16, device=where) for where in ("cpu", device))
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}),
        pytest.raises(SurgeryError, match="needs a GPU"),
    ):
        executor.backend_name(named, on_cpu, on_cpu, 8)
    with (
        mock.patch.object(triton, "_installed", lambda: False),
        pytest.raises(SurgeryError, match="not installed"),
    ):
        executor.backend_name(named, q, q, 8)


@pytest.mark.parametrize(
    ("capability", "room", "family"),
    [
        ((9, 0), 232448, "sm90"),
        ((8, 7), 166912, "sm80"),
        ((10, 3), 232448, "sm100"),
        ((12, 1), 101376, "sm89"),
        ((13, 0), 49152, "sm89"),
    ],
)
def test_a_gpu_without_configurations_takes_those_that_fit(
    capability: tuple[int, int], room: int, family: str
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=room)
    with mock.patch("torch.cuda.get_device_properties", lambda _: properties):
        assert tuning.family_of.__wrapped__(torch.device("cuda")) == family


@pytest.mark.parametrize(
    ("name", "family"), [("gfx950:sramecc+", "gfx950"), ("gfx90a:xnack-", "gfx942"), ("gfx1100", "gfx942")]
)
def test_an_amd_gpu_without_configurations(name: str, family: str) -> None:
    with (
        mock.patch("torch.version.hip", "7.0"),
        mock.patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(gcnArchName=name)),
    ):
        assert tuning.family_of.__wrapped__(torch.device("cuda")) == family


def test_old_gpus_are_named() -> None:
    with (
        mock.patch("torch.cuda.get_device_capability", lambda _: (7, 5)),
        mock.patch("torch.cuda.get_device_name", lambda _: "Tesla T4"),
    ):
        assert "8.0 or more, and Tesla T4 has 7.5" in str(triton._too_old.__wrapped__(torch.device("cuda")))
    with mock.patch("torch.cuda.get_device_capability", lambda _: (8, 0)):
        assert triton._too_old.__wrapped__(torch.device("cuda")) is None


def test_too_little_shared_memory(device: torch.device) -> None:
    with (
        pytest.raises(SurgeryError, match=r"needs 117,760 bytes of shared memory, and this GPU has 101,376"),
        launching(torch.zeros(1, device=device)),
    ):
        raise OutOfResources(117760, 101376, "shared memory")


@pytest.mark.parametrize(
    ("change", "head_dim", "message"),
    [
        ({"chunk_size": 16384}, 64, "chunks of up to 8192 keys of 64 channels, not chunk_size=16384"),
        ({"chunk_size": 32768}, 128, "chunks of up to 8192 keys.*, not chunk_size=32768"),
        ({"chunk_size": 8192}, 160, "chunks of up to 4096 keys of 160 channels"),
    ],
)
def test_chunks_that_no_program_holds_are_refused(
    change: dict[str, Any], head_dim: int, message: str, device: torch.device
) -> None:
    q = torch.zeros(1, 1, 1, head_dim, device=device)
    config = dataclasses.replace(CONFIG, **change)
    assert re.search(message, triton.obstacle(config, q, q, 8) or "")
    with pytest.raises(SurgeryError, match=f"backend='triton' cannot run this: .*{message}"):
        executor.backend_name(dataclasses.replace(config, backend="triton"), q, q, 8)
    assert executor.backend_name(dataclasses.replace(config, backend="auto"), q, q, 8) == "gather"
    assert triton.obstacle(dataclasses.replace(config, chunk_size=4096), q, q, 8) is None

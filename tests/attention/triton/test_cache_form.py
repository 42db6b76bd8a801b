"""A cache knows its pages in one form, whatever calls on it record: docs/semantics.md, "Caches"."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton.test_decode_model import CONFIG, tiny, tokens

import llama_surgery as surgery
from llama_surgery.attention import executor
from llama_surgery.attention.impl.triton.layout.launch import build_layout as kernel_layout
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.topology.layout import Moments, mean_values

SUMMARISED = dataclasses.replace(CONFIG, summary="page", backend="auto")
START, STOP = 54, 57

Mode = Callable[[], contextlib.AbstractContextManager[object]]


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="auto"`` takes the kernels where they can run a call, as on a GPU."""
    plain = executor.backend_name

    def name(config: SurgeryConfig, *args: object, **options: object) -> str:
        if config.backend == "auto":
            with contextlib.suppress(SurgeryError):
                return plain(dataclasses.replace(config, backend="triton"), *args, **options)  # type: ignore[arg-type]
        return plain(config, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(executor, "backend_name", name)


def answers(device: torch.device, *modes: Mode) -> torch.Tensor:
    """Logits after a prompt: the prompt in the first mode, every following token in the next."""
    model, ids = tiny(device), tokens(1, STOP).to(device)
    spans = ((0, START), (START, START + 1), (START + 1, STOP))
    with surgery.operated(model, SUMMARISED):
        cache, parts = surgery.paged_cache(model), []
        for mode, (start, stop) in zip(modes, spans, strict=True):
            with mode():
                parts.append(model(ids[:, start:stop], **{CACHE_NAME: cache}).logits.detach().clone())
    return torch.cat(parts[1:], 1)


@functools.cache
def expected(device: torch.device) -> torch.Tensor:
    """No call records gradients."""
    return answers(device, torch.no_grad, torch.no_grad, torch.no_grad)


@pytest.mark.usefixtures("automatic", "poisoned")
@pytest.mark.parametrize(
    "modes",
    [
        (torch.enable_grad, torch.no_grad, torch.no_grad),
        (torch.no_grad, torch.enable_grad, torch.no_grad),
        (torch.inference_mode, torch.enable_grad, torch.inference_mode),
    ],
    ids=["gradients first", "gradients later", "inference mode"],
)
def test_logits_do_not_depend_on_which_calls_record_gradients(
    modes: tuple[Mode, ...], device: torch.device
) -> None:
    torch.testing.assert_close(answers(device, *modes), expected(device), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("automatic")
def test_gradients_reach_a_prompt_through_summaries_that_kernels_read(device: torch.device) -> None:
    """Kept as the kernels' features, moments are differentiable where gradients are asked for."""
    model, ids = tiny(device), tokens(1, STOP).to(device)
    found = {}
    for backend in ("gather", "auto"):
        model.zero_grad()
        with surgery.operated(model, dataclasses.replace(SUMMARISED, backend=backend)):
            cache = surgery.paged_cache(model)
            for start, stop in ((0, START), (START, STOP)):
                logits = model(ids[:, start:stop], **{CACHE_NAME: cache}).logits
            logits.square().sum().backward()
        assert cache.paged[0].buffers.kernels == (backend == "auto")
        found[backend] = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    assert found["gather"].abs().max() > 1e-2
    torch.testing.assert_close(found["auto"], found["gather"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_while_chunks_are_sorted_is_what_pytorch_makes_of_them(device, dtype) -> None:
    keys, values = torch.randn(2, 2, 4 * CONFIG.chunk_size, 16, device=device).to(dtype)
    config = dataclasses.replace(CONFIG, summary="page")
    layout = kernel_layout(keys, values, config)
    moments = Moments(layout.moments.mean.requires_grad_(), layout.moments.variance, config.page_size)
    plain = dataclasses.replace(layout, features=None, moments=moments)
    made = executor.kernel_features(plain, dtype)
    assert made.requires_grad  # the interpreter cuts bits off where it should round
    torch.testing.assert_close(made.detach(), executor.kernel_features(layout, dtype))
    want = mean_values(layout.values, config, dtype)
    torch.testing.assert_close(layout.mean_values, want)
    first = (layout.order[:, 0] == 0).int().argmax(-1) // config.page_size
    assert torch.equal(layout.sink_page, first.int())


def test_decode_kernels_leave_gradients_of_a_recorded_prompt_alone(device: torch.device) -> None:
    """A trained prompt: keys of a new token need no gradient, those of the prompt before it do."""
    model, ids = tiny(device), tokens(1, START + 1).to(device)
    model.requires_grad_(False)
    prompt = model.get_input_embeddings()(ids[:, :START]).requires_grad_()
    found = {}
    for backend in ("gather", "triton"):
        with surgery.operated(model, dataclasses.replace(CONFIG, backend=backend)):
            cache = surgery.paged_cache(model)
            model(inputs_embeds=prompt, **{CACHE_NAME: cache})
            logits = model(ids[:, START:], **{CACHE_NAME: cache}).logits
        found[backend] = torch.autograd.grad(logits.sum(), prompt)[0]
    assert found["gather"].abs().max() > 1e-3
    torch.testing.assert_close(found["triton"], found["gather"], rtol=1e-3, atol=1e-4)


def test_a_form_is_decided_once(device: torch.device) -> None:
    """Also for streams that are selected, and whatever the later writes are like."""
    config = dataclasses.replace(CONFIG, backend="triton")
    buffers, states = PageBuffers(config, 2, device), torch.randn(2, 5, 16, device=device)
    buffers.reserve(40)
    buffers.write(slice(None), 0, states, states)
    assert buffers.kernels is True
    assert buffers.select(torch.tensor([1, 1], device=device)).kernels is True
    object.__setattr__(config, "backend", "gather")
    buffers.write(slice(None), 5, states, states)
    assert buffers.kernels is True

"""Gradients through a cache: right however calls differ, and no copy of the cache in any step."""

import contextlib
import dataclasses

import pytest
import torch
from tests.surgery.tiny import DENSE_LIMIT, SINGLE, SPARSE, build, in_pieces, llama, logits, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from llama_surgery import operated, paged_cache
from llama_surgery.surgery import store as store_module
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.store import SequenceStore

EXACT = {"rtol": 1e-9, "atol": 1e-9}
CHUNK = SINGLE.chunk_size


class Copies(TorchDispatchMode):
    """Bytes of the largest copy, and of all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "cat", "_to_copy", "contiguous"):
            size = out.numel() * out.element_size()
            self.largest, self.total = max(self.largest, size), self.total + size
        return out


def test_a_step_that_records_gradients_copies_no_more_than_one_that_does_not():
    """Whoever forgets torch.no_grad() does not pay for the whole cache in every step."""
    model, found = build("Llama"), {}
    ids = tokens(1, 16 * CHUNK + 8)
    with operated(model, SPARSE):
        for mode in (torch.no_grad, torch.enable_grad):
            with torch.no_grad():
                cache = model(ids[:, : 16 * CHUNK])[CACHE_NAME]
            cache.paged[0].buffers.reserve(17 * CHUNK)  # growing is not what is measured
            cache.paged[1].buffers.reserve(17 * CHUNK)
            with mode(), Copies() as copies:
                for at in range(16 * CHUNK, 16 * CHUNK + 8):
                    out = model(ids[:, at : at + 1], **{CACHE_NAME: cache})
            found[mode] = copies, out.logits
            held = cache.paged[0].buffers.keys
    plain, recorded = (found[mode][0] for mode in (torch.no_grad, torch.enable_grad))
    assert found[torch.enable_grad][1].requires_grad
    assert recorded.largest == plain.largest < held.numel() * held.element_size()
    assert recorded.total < 1.5 * plain.total


@pytest.mark.parametrize("cuts", [[90], [70, 71, 130, 131, 132], list(range(140, 200))])
def test_gradients_do_not_depend_on_the_cuts(cuts):
    model, ids = llama(), tokens(1, 210)
    model.requires_grad_(True)
    weight = model.model.layers[0].self_attn.k_proj.weight
    with operated(model, SINGLE):
        whole = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), weight)[0]
        cache, parts = paged_cache(model), []
        for start, stop in zip([0, *cuts], [*cuts, 210], strict=True):
            parts.append(model(ids[:, start:stop], **{CACHE_NAME: cache}).logits)
        pieces = torch.autograd.grad(torch.cat(parts, 1).square().mean(), weight)[0]
    torch.testing.assert_close(pieces, whole, **EXACT)


def states(count: int, seed: int = 0) -> torch.Tensor:
    """(1, 1, count, 4) float64."""
    return torch.randn(
        1, 1, count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def put(store: SequenceStore, new: torch.Tensor) -> torch.Tensor:
    """Append, and return the near keys."""
    return store.append(new, new, since=store.length // CHUNK * CHUNK)[0]


@pytest.mark.parametrize("between", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_do_not_mix_up_those_of_others(between):
    """A chunk begun with gradients is filled and sorted without: they still reach the right tokens."""
    first, last = states(100), states(30, 2)
    store = SequenceStore(SINGLE)
    put(store, first)
    with between():
        put(store, states(40, 1).detach())
    put(store, last)
    assert store._buffers.keys.requires_grad
    weights = torch.arange(128.0, dtype=torch.float64)[None, :, None]
    order = store.layout.order.long() + torch.arange(2)[:, None] * CHUNK
    (store.layout.keys * weights[:, order.flatten()]).sum().backward()
    torch.testing.assert_close(first.grad, weights[None, :, :100].expand_as(first), **EXACT)
    assert not last.grad.any(), "its tokens are in no full chunk"


@pytest.mark.parametrize("length", [64, 90, 130])
@pytest.mark.parametrize("after", [torch.enable_grad, torch.no_grad])
def test_what_was_cropped_and_written_again_has_no_gradient(length, after):
    """And what an earlier call read of it is as it was when that call's gradients are asked for."""
    first, second = states(140), states(80, 1)
    store = SequenceStore(SINGLE)
    put(store, first)
    early = store.layout.keys.pow(3).sum()  # a backward pass reads the keys again
    store.truncate(length)
    with after():
        put(store, second)
    near = store.layout.keys[:, :128].sum()
    (early + near).backward()
    expected = torch.zeros_like(first)
    expected[:, :, :128] = 3 * first.detach()[:, :, :128].square()
    expected[:, :, : min(length, 128)] += 1
    torch.testing.assert_close(first.grad, expected, **EXACT)
    if after is torch.enable_grad:
        expected = torch.zeros_like(second)
        expected[:, :, : max(0, 128 - length)] = 1
        torch.testing.assert_close(second.grad if second.grad is not None else 0 * second, expected, **EXACT)
    else:
        assert second.grad is None


def test_an_adapter_of_queries_alone_is_trained_through_a_cache():
    """Keys need no gradient then, but a backward pass reads them after later calls have written."""
    model, ids = build("Llama"), tokens(1, 150)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    with operated(model, SPARSE):
        expected = torch.autograd.grad(model(ids[:, :96]).logits.sum(), weight)[0]
        out = model(ids[:, :96])
        in_pieces(model, ids[:, 96:], [40], out[CACHE_NAME])
        torch.testing.assert_close(torch.autograd.grad(out.logits.sum(), weight)[0], expected, **EXACT)


def test_a_recorded_cache_grows_without_losing_gradients():
    keys = states(CHUNK)
    store = SequenceStore(SINGLE)
    put(store, keys)
    with torch.no_grad():
        put(store, states(300, 1).detach())
    store.layout.keys.sum().backward()
    torch.testing.assert_close(keys.grad, torch.ones_like(keys), **EXACT)


def test_a_long_chain_of_steps_can_be_followed_back_and_let_go():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    store = SequenceStore(SINGLE)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for _ in range(32 * CHUNK):
        put(store, weight * one)
    store.layout.keys.sum().backward()
    assert weight.grad == 32 * CHUNK
    del store


def test_a_prompt_read_in_inference_mode_goes_on_with_gradients():
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        expected = logits(model, ids)
        with torch.inference_mode():
            cache = model(ids[:, :96])[CACHE_NAME]
        got = model(ids[:, 96:], **{CACHE_NAME: cache}).logits
        got.sum().backward()
    torch.testing.assert_close(got.detach(), expected[:, 96:], **EXACT)


@pytest.mark.parametrize("use_cache", [True, False])
def test_gradients_pass_where_the_host_does_not_look_at_keys(use_cache, monkeypatch):
    """As on a GPU, where what shows bad keys is added to keys that autograd has saved."""
    model, ids = build("Llama"), tokens(1, 150)
    found = []
    with operated(model, dataclasses.replace(SPARSE, summary="page")):
        for devices in (("cpu",), ()):
            monkeypatch.setattr(store_module, "CHECKED_DEVICES", devices)
            model.zero_grad()
            model(ids, labels=ids, use_cache=use_cache).loss.backward()
            found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], **EXACT)


def test_attention_sinks_have_the_dense_models_gradient():
    model, ids = build("GptOss", dtype=torch.float32, layer_types=["full_attention"] * 2), tokens(1, 200)
    found = []
    for around in (contextlib.nullcontext(), operated(model, DENSE_LIMIT)):
        model.zero_grad()
        with around:
            model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for name, p in model.named_parameters() if "sinks" in name])
    assert len(found[0]) == 2 and all(grad.norm() > 0 for grad in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)

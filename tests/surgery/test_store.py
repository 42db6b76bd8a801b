"""What a store costs as it grows: room is made rarely, and what a chunk's layout found is found once."""

import dataclasses
from unittest import mock

import pytest
import torch
from tests.surgery.tiny import SINGLE, SPARSE

from llama_surgery.attention.api import attend
from llama_surgery.surgery import buffers as buffers_module
from llama_surgery.surgery import store as store_module
from llama_surgery.surgery.buffers import GROWTH, PageBuffers
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.layout import restore

CHUNK = SPARSE.chunk_size


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    """(sequences, kv_heads, tokens, head_dim)."""
    return torch.randn(2, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))


def grow(store: SequenceStore, keys: torch.Tensor, pieces: list[int]) -> None:
    for piece in pieces:
        new = keys[:, :, store.length : store.length + piece]
        store.append(new, new.clone(), since=store.length // CHUNK * CHUNK)


@torch.no_grad()
def test_every_chunk_is_laid_out_once() -> None:
    keys, store = states(300), SequenceStore(SPARSE)
    with mock.patch.object(buffers_module, "build_layout", wraps=buffers_module.build_layout) as built:
        grow(store, keys, [70] + [1] * 230)
    assert [call.args[0].shape[1] for call in built.call_args_list] == [CHUNK] * 4
    whole = SequenceStore(SPARSE)
    grow(whole, keys, [300])
    assert torch.equal(store.layout.order, whole.layout.order)
    assert torch.equal(store.layout.keys, whole.layout.keys)
    assert torch.equal(store.layout.moments.variance, whole.layout.moments.variance)


@torch.no_grad()
def test_room_is_made_rarely_and_never_much_too_large() -> None:
    store, moved = SequenceStore(SPARSE), 0
    grow(store, states(1), [1])
    for _ in range(2 * GROWTH * CHUNK):
        before = store._buffers.keys.data_ptr()
        one = torch.zeros(2, 2, 1, 8)
        store.append(one, one, since=store.length)
        moved += store._buffers.keys.data_ptr() != before
        assert store._buffers.capacity <= store.length * (1 + 1 / GROWTH) + CHUNK + 1
    assert moved <= 2 * GROWTH + 1


@torch.no_grad()
def test_no_room_is_made_beyond_a_known_maximum() -> None:
    buffers = PageBuffers(SPARSE, 4, torch.device("cpu"))
    buffers.maximum = 40 * CHUNK + 5
    buffers.reserve(39 * CHUNK)
    assert buffers.capacity == 41 * CHUNK
    buffers.reserve(42 * CHUNK)  # it was exceeded after all
    assert buffers.capacity >= 42 * CHUNK


def test_a_single_call_keeps_nothing() -> None:
    keys = states(200).requires_grad_()
    store = SequenceStore(SPARSE, keep=False)
    near, _ = store.append(keys, keys, since=0)
    assert store._buffers is None and near.shape[1] == 200
    assert store.layout.keys.requires_grad and store.layout.chunks == 3


def test_gradients_reach_what_earlier_calls_stored() -> None:
    keys = states(150).double().requires_grad_()
    store = SequenceStore(SINGLE)
    first = keys[:, :, :100]
    store.append(first, first, since=0)
    early = store.layout.keys.square().sum()  # saved by autograd, and not to be written over
    near, _ = store.append(keys[:, :, 100:], keys[:, :, 100:], since=0)
    (early + near.square().sum() + store.layout.keys.square().sum()).backward()
    expected = torch.full_like(keys, 2.0)  # once near
    expected[:, :, :64] += 4.0  # twice in a layout, the first chunk
    expected[:, :, 64:128] += 2.0  # once, the second
    torch.testing.assert_close(keys.grad, expected * keys.detach())


@pytest.mark.parametrize("inside_first", [False, True])
def test_inference_mode_may_begin_and_end_between_calls(inside_first: bool) -> None:
    keys, store = states(180), SequenceStore(SPARSE)
    for piece, inside in ((90, inside_first), (90, not inside_first)):
        with torch.inference_mode() if inside else torch.no_grad():
            grow(store, keys, [piece])
    in_order = restore(store.layout.keys, store.layout.order)
    assert torch.equal(in_order[0], keys[0, 0, :128])


@pytest.mark.parametrize("where", [10, 70, 140])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("keep", [True, False])
def test_keys_that_are_not_finite_show_where_the_host_does_not_look(where, value, keep, monkeypatch) -> None:
    """As on a GPU: all later queries get NaN that have the key in their far field, and no other sequence."""
    monkeypatch.setattr(store_module, "CHECKED_DEVICES", ())
    keys = states(300)
    keys[1, 0, where, 3] = value
    store = SequenceStore(SPARSE, keep=keep)
    near, _ = store.append(keys, keys.nan_to_num(0, 0, 0), since=0)
    out = attend(
        torch.randn(4, 1, 300, 8), near, near, store.layout, config=SPARSE, start=0
    ).out  # streams are (sequence, KV head)
    assert out[[0, 1, 3]].isfinite().all()
    closed = (where // CHUNK + 1) * CHUNK + SPARSE.window
    # Before that a query sees the key itself: infinity may weigh nothing, in dense attention too.
    assert out[2, :, where if value is torch.nan else closed :].isnan().all()


def test_a_bad_key_shows_in_decode_steps_long_after(monkeypatch) -> None:
    monkeypatch.setattr(store_module, "CHECKED_DEVICES", ())
    keys, store = states(200), SequenceStore(SINGLE)
    keys[0, 0, 70] = torch.nan
    grow(store, keys, [60] + [1] * 140)
    near, _ = store.append(keys[:, :, :1], keys[:, :, :1], since=128)
    out = attend(torch.randn(4, 1, 1, 8), near, near, store.layout, config=SINGLE, start=200).out
    assert out[0].isnan().all() and out[1:].isfinite().all()


@pytest.mark.gpu
def test_a_bad_key_shows_on_a_gpu() -> None:
    """Through the kernels, whose selection and layout then meet scores that are not numbers."""
    config = dataclasses.replace(SPARSE, backend="triton")
    keys, store = states(200).cuda(), SequenceStore(config)
    keys[0, 0, 70] = torch.nan
    near, _ = store.append(keys, keys.nan_to_num(0), since=0)
    out = attend(torch.randn(4, 1, 200, 8).cuda(), near, near, store.layout, config=config, start=0).out
    assert out[0, :, 160:].isnan().all() and out[1:].isfinite().all()

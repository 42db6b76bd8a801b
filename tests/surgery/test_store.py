"""What a store costs as it grows: room is made rarely, and what a chunk's layout found is found once."""

import dataclasses
from unittest import mock

import pytest
import torch
from tests.surgery.tiny import SINGLE, SPARSE

from llama_surgery.surgery import store as store_module
from llama_surgery.surgery.buffers import GROWTH, PageBuffers
from llama_surgery.surgery.store import SequenceStore

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
    with mock.patch.object(store_module, "build_layout", wraps=store_module.build_layout) as built:
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
    keys, store = states(180), SequenceStore(dataclasses.replace(SPARSE, directions="position"))
    for piece, inside in ((90, inside_first), (90, not inside_first)):
        with torch.inference_mode() if inside else torch.no_grad():
            grow(store, keys, [piece])
    assert torch.equal(store.layout.keys[0], keys[0, 0, :128])

"""What the kernels of decode would misread is refused; what the host cannot know shows in the answer."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton.decode_caches import loaded

from llama_surgery.attention.impl.triton.decode import cache as decode_cache
from llama_surgery.attention.impl.triton.decode.cache import DecodeCache, append_tokens
from llama_surgery.attention.impl.triton.decode.launch import decode
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=16, theta=0.1)
DIM, HEADS = 16, 2


@pytest.fixture
def cache(device: torch.device) -> DecodeCache:
    """Two sequences of 62 and 40 tokens in a cache of 64."""
    generator, sequences = torch.Generator().manual_seed(0), []
    for length in (62, 40):
        keys, values = torch.randn(2, 1, length, DIM, generator=generator).to(device)
        layout = build_layout(keys[:, :32], values[:, :32], CONFIG)
        sequences.append((layout, keys[:, 32:], values[:, 32:]))
    return loaded(CONFIG, sequences, 64)[1]


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host does not know the lengths, as on a GPU."""
    monkeypatch.setattr(decode_cache, "check_tokens", lambda *_: None)
    yield


def states(rows: int, device: torch.device, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of new rows of both sequences."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, HEADS, rows, DIM, generator=generator)
    new = torch.randn(2, 2, rows, DIM, generator=generator)
    return queries.to(device), *new.to(device)


@pytest.mark.parametrize("longest", [None, 62, 64])
def test_tokens_without_room_are_refused(
    longest: int | None, cache: DecodeCache, device: torch.device
) -> None:
    if longest is None and device.type == "cuda":
        pytest.skip("the device is not asked")
    _, keys, values = states(3, device)
    before = cache.keys.clone()
    known = {} if longest is None else {"longest": longest}
    with pytest.raises(SurgeryError, match=r"3 new tokens behind 6. for a cache of 64"):
        append_tokens(cache, keys, values, **known)
    assert torch.equal(cache.keys.nan_to_num(7.0), before.nan_to_num(7.0))
    append_tokens(cache, keys[:, :2], values[:, :2], longest=62)


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("further", [0, 1000])
def test_rows_beyond_the_capacity_are_nan_and_no_others(
    further: int, cache: DecodeCache, device: torch.device
) -> None:
    """Two of four new tokens of the first sequence have room, later none; the second sequence has room."""
    queries, keys, values = states(4, device)
    append_tokens(cache, keys[:, :2], values[:, :2])
    expected = decode(queries[:, :, :2].contiguous(), cache)
    append_tokens(cache, keys, values)
    cache.lengths[0] += further
    tally = torch.zeros(2, 1, dtype=torch.int64, device=device)
    result = decode(queries, cache, tally=tally)
    there = 0 if further else 2
    assert result.out[0, :, there:].isnan().all() and result.lse[0, :, there:].isnan().all()
    torch.testing.assert_close(result.out[0, :, :there], expected.out[0, :, :there])
    assert result.out[1].isfinite().all() and result.lse[1].isfinite().all()
    torch.testing.assert_close(result.out[1, :, :2], expected.out[1])
    assert not result.opened[0, there:].any() and tally[0, 0] == result.opened.sum()


def test_new_tokens_of_another_shape_or_dtype(cache: DecodeCache, device: torch.device) -> None:
    _, keys, values = states(1, device)
    for wrong in ((keys[:1], values), (keys, values.half()), (keys[..., :8], values), (keys[0], values[0])):
        with pytest.raises(SurgeryError, match=r"new (keys|values)"):
            append_tokens(cache, *wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"lengths": c.lengths.long()}, r"lengths .*int64"),
        (lambda c: {"lengths": torch.stack((c.lengths, c.lengths), 1)[:, 0]}, "lengths must be contiguous"),
        (lambda c: {"values": c.values.half()}, r"values .*float16"),
        (lambda c: {"keys": c.keys.transpose(3, 4).contiguous().transpose(3, 4)}, "last stride must be 1"),
        (lambda c: {"features": c.features[..., :8]}, r"features .*expected \(2, 1, 2, 4, 32\)"),
        (lambda c: {"sink_page": c.sink_page.long()}, "sink_page"),
        (lambda c: {"table": torch.zeros(2, 2, dtype=torch.int64, device=c.keys.device)}, r"table .*int64"),
        (
            lambda c: {"table": torch.zeros(2, 2, dtype=torch.int32, device=c.keys.device).t()},
            "last stride must be 1",
        ),
    ],
)
def test_caches_that_would_be_misread(change, message: str, cache: DecodeCache) -> None:
    with pytest.raises(SurgeryError, match=message):
        dataclasses.replace(cache, **change(cache))


def test_calls_that_would_be_misread(cache: DecodeCache, device: torch.device) -> None:
    queries, keys, values = states(1, device)
    append_tokens(cache, keys, values)
    for tally in (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(SurgeryError, match="tally"):
            decode(queries, cache, tally=tally.to(device))
    weights = torch.ones(1, HEADS, DIM, device=device)
    for router in (
        PageRouter(offset=torch.zeros(2, HEADS, device=device)),
        PageRouter(mean_weight=weights[..., :8]),
        PageRouter(variance_weight=weights.double()),
    ):
        with pytest.raises(SurgeryError, match="router"):
            decode(queries, cache, router=router)


def test_weights_in_any_order_of_memory(cache: DecodeCache, device: torch.device) -> None:
    queries, keys, values = states(1, device)
    append_tokens(cache, keys, values)
    weights = torch.rand(1, HEADS, DIM, generator=torch.Generator().manual_seed(2)).to(device)
    scattered = weights.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    outs = [decode(queries, cache, router=PageRouter(None, w, w)).lse for w in (weights, scattered)]
    assert torch.equal(*outs)

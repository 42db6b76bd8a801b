"""Kernels on an engine's caches say what plain PyTorch says: shuffled tables, any strides, shared blocks."""

import dataclasses

import pytest
import torch
from tests.serving.batches import attend_piece, near_in_cache

pytest.importorskip("triton")

from llama_surgery.attention.executor import kernel_moments
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.paged import PagedStates, side_bytes
from llama_surgery.serving.paged_kernels import decode_rows
from llama_surgery.surgery.rows import Part

KV_HEADS, GROUP, DIM = 2, 3, 16
SCALE = 0.3
CONFIG = SurgeryConfig(
    chunk_size=64, page_size=16, window=32, tile=8, theta=0.05, theta_decode=0.02, summary="page"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass
class Served:
    """Caches with sequences of ``lengths`` tokens in them."""

    cache: PagedStates
    lengths: list[int]
    tables: torch.Tensor  # (sequences, chunks) int32

    def blocks(self, index: int) -> torch.Tensor:
        chunks = -(-self.lengths[index] // self.cache.config.chunk_size)
        return self.tables[index, :chunks].long()

    def oracle(self, queries: torch.Tensor, index: int) -> torch.Tensor:
        """The last row's attention in plain PyTorch."""
        last, rows = self.lengths[index], queries[index].view(KV_HEADS, GROUP, 1, DIM)
        part, cache, blocks = Part(last - 1, last, 1), plain(self.cache), self.blocks(index)
        near = near_in_cache(cache, blocks, part, last)
        result = attend_piece(rows, near, cache, blocks, part, scale=SCALE)
        return result.out.reshape(-1, DIM)


def moments(cache: PagedStates) -> torch.Tensor:
    """(blocks, kv_heads, pages, 2 · head_dim) of kernels' features."""
    found = kernel_moments(cache.scores.flatten(0, 1), cache.config)
    return torch.cat((found.mean, found.variance), -1).unflatten(0, (-1, KV_HEADS))


def plain(cache: PagedStates) -> PagedStates:
    """The same caches for plain PyTorch."""
    config = dataclasses.replace(cache.config, backend="gather")
    side = torch.zeros(len(cache.keys), KV_HEADS, side_bytes(config, DIM) // 4, device=DEVICE)
    made = PagedStates(cache.keys, cache.values, side, config)
    made.scores.copy_(moments(cache))
    made._orders.copy_(cache._orders)
    if made.mean_values is not None:
        made.mean_values.copy_(cache.mean_values)
    return made


def serve(config: SurgeryConfig, lengths: list[int], shared: int = 0) -> Served:
    """Fill poisoned caches whose strides are an engine's; the first ``shared`` blocks belong to all."""
    generator = torch.Generator().manual_seed(sum(lengths))
    size, most = config.chunk_size, max(lengths)
    chunks = [-(-n // size) for n in lengths]
    count = 1 + sum(chunks)
    nan, width = float("nan"), side_bytes(config, DIM, torch.float32) // 4
    # The engine keeps a block's rows before its heads, and pages of other layers between two blocks.
    states = torch.full((count, 3, size, KV_HEADS, 2 * DIM), nan, device=DEVICE)[:, 1].transpose(1, 2)
    side = torch.full((count, 2, KV_HEADS, width + 16), nan, device=DEVICE)[:, 0]
    cache = PagedStates(states[..., :DIM], states[..., DIM:], side, config, kernels=True)
    numbers = torch.randperm(count - 1, generator=generator) + 1  # block 0 is nobody's
    tables = torch.full((len(lengths), max(chunks) + 1), 2**30, dtype=torch.int32)
    draw = torch.randn(2, most, KV_HEADS, DIM, generator=generator)
    for index, length in enumerate(lengths):
        mine, numbers = numbers[: chunks[index]], numbers[chunks[index] :]
        tables[index, : chunks[index]] = mine
        tables[index, :shared] = tables[0, :shared]
        rows = torch.randn(2, length, KV_HEADS, DIM, generator=generator)
        rows[:, : shared * size] = draw[:, : shared * size]
        at = torch.arange(length)
        slots = tables[index, at // size].long() * size + at % size
        cache.write(*rows.to(DEVICE), slots.to(DEVICE))
        new = slice(shared if index else 0, length // size)
        cache.fill(tables[index, new].long().to(DEVICE))
    return Served(cache, lengths, tables.to(DEVICE))


def queries_for(served: Served) -> torch.Tensor:
    """As an engine hands them over: the first columns of a wider product."""
    shape = (len(served.lengths), 2 * KV_HEADS * GROUP, DIM)
    wide = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    return wide[:, : KV_HEADS * GROUP]


def positions_of(served: Served) -> torch.Tensor:
    return torch.tensor(served.lengths, dtype=torch.int32, device=DEVICE) - 1


def check(config: SurgeryConfig, lengths: list[int], shared: int = 0) -> torch.Tensor:
    """Decode rows equal the oracle; pages opened and read."""
    served = serve(config, lengths, shared)
    queries, tally = queries_for(served), torch.zeros(2, KV_HEADS, dtype=torch.int64, device=DEVICE)
    got = decode_rows(queries, served.cache, served.tables, positions_of(served), scale=SCALE, tally=tally)
    for index in range(len(lengths)):
        torch.testing.assert_close(got[index], served.oracle(queries, index), rtol=3e-5, atol=3e-5)
    return tally


class TestDecodeRows:
    def test_a_ragged_batch_with_a_shared_prefix(self) -> None:
        # A first token, rows that fill a chunk and that begin one, chunks that just closed.
        tally = check(CONFIG, [300, 128, 129, 333, 191, 192], shared=2)
        assert (tally > 0).all()
        check(CONFIG, [1, 63, 64, 65, 95, 96, 97, 420])

    @pytest.mark.parametrize(
        "change",
        [
            {"chunk_size": 192, "page_size": 24, "window": 24, "tile": 12},
            {"dense_until": 1 << 20},
            {"dense_until": 160},
            {"theta": 0.0, "theta_decode": 0.0},
        ],
        ids=str,
    )
    def test_configurations(self, change: dict[str, object]) -> None:
        check(dataclasses.replace(CONFIG, **change), [150, 460])  # type: ignore[arg-type]

    def test_padding_of_the_batch_is_zero(self) -> None:
        served = serve(CONFIG, [200, 1])
        tables, positions = served.tables.clone(), positions_of(served)
        tables[1], positions[1] = 0, -1  # block 0 holds NaN
        got = decode_rows(queries_for(served), served.cache, tables, positions)
        assert not got[1].any() and got[0].isfinite().all() and got[0].any()

    def test_sequences_that_see_everything(self) -> None:
        """Beside others, whatever the order of their chunks; their pages are not counted."""
        config, lengths = dataclasses.replace(CONFIG, theta_decode=0.5), [300, 460, 1]
        served, dense = serve(config, lengths), dataclasses.replace(config, theta=0.0, theta_decode=0.0)
        queries, positions = queries_for(served), positions_of(served)
        tally = torch.zeros(2, KV_HEADS, dtype=torch.int64, device=DEVICE)
        whole = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
        given = {"scale": SCALE, "tally": tally, "whole": whole}
        got = decode_rows(queries, served.cache, served.tables, positions, **given)
        everything = dataclasses.replace(served, cache=dataclasses.replace(served.cache, config=dense))
        for index, asked in enumerate((served, everything, everything)):
            torch.testing.assert_close(got[index], asked.oracle(queries, index), rtol=3e-5, atol=3e-5)
        assert (got[1] - served.oracle(queries, 1)).abs().max() > 1e-3
        alone = torch.zeros_like(tally)
        first = queries[:1], served.cache, served.tables[:1], positions[:1]
        decode_rows(*first, scale=SCALE, tally=alone)
        assert torch.equal(tally, alone)
        with pytest.raises(SurgeryError, match=r"whole \(2,\) torch.int32"):
            decode_rows(queries, served.cache, served.tables, positions, whole=whole[:2])

    def test_what_does_not_fit_is_refused(self) -> None:
        served = serve(CONFIG, [70])
        queries, positions = queries_for(served), positions_of(served)
        with pytest.raises(SurgeryError, match=r"tables .*int64: expected"):
            decode_rows(queries, served.cache, served.tables.long(), positions)
        with pytest.raises(SurgeryError, match=r"positions \(2,\)"):
            decode_rows(queries, served.cache, served.tables, positions.repeat(2))
        with pytest.raises(SurgeryError, match="5 query heads for 2"):
            decode_rows(queries[:, :5], served.cache, served.tables, positions)


@pytest.mark.parametrize("part", [(0, 40, 8), (232, 290, 8), (296, 300, 1)])
def test_pieces_of_prompts(part: tuple[int, int, int]) -> None:
    served = serve(CONFIG, [300])
    shape = (KV_HEADS, GROUP, part[1] - part[0], DIM)
    queries = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(DEVICE)
    cache, blocks = served.cache, served.blocks(0)
    near = near_in_cache(cache, blocks, Part(*part), 300)
    heads_first = dataclasses.replace(cache, keys=cache.keys.contiguous(), values=cache.values.contiguous())
    by_channel = dataclasses.replace(cache, keys=cache.keys.mT.contiguous().mT)
    want = attend_piece(queries, near, plain(cache), blocks, Part(*part), scale=SCALE)
    for held in (cache, heads_first, by_channel):
        got = attend_piece(queries, near, held, blocks, Part(*part), scale=SCALE)
        torch.testing.assert_close(got.out, want.out, rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(got.lse, want.lse, rtol=3e-5, atol=3e-5)


def test_side_caches_agree_and_cost_what_is_said() -> None:
    """The same chunks in both kinds of side cache, in half precision too."""
    served = serve(CONFIG, [150])
    keys, values = served.cache.keys, served.cache.values
    side = torch.zeros(len(keys), KV_HEADS, side_bytes(CONFIG, DIM) // 4, device=DEVICE)
    plain = PagedStates(keys, values, side, CONFIG)
    blocks = served.blocks(0)[:2]
    want, order = (keys[blocks], values[blocks]), served.cache.order(blocks)
    near = near_in_cache(served.cache, served.blocks(0), Part(0, 128, CONFIG.tile), 150)
    for held, states in zip((keys, values), near, strict=True):
        held[blocks] = states.unflatten(1, (2, -1)).transpose(0, 1)
    plain.fill(blocks, None)
    assert torch.equal(keys[blocks], want[0]) and torch.equal(values[blocks], want[1])
    assert torch.equal(plain.order(blocks), order)
    torch.testing.assert_close(moments(served.cache)[blocks], plain.scores[blocks])
    torch.testing.assert_close(served.cache.mean_values[blocks], plain.mean_values[blocks])
    config = SurgeryConfig(summary="none")
    half = side_bytes(config, 128, torch.bfloat16)
    assert half % 64 == 0 and half < side_bytes(config, 128) * 0.6

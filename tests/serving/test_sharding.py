"""Two tensor ranks over gloo compute together what one computes, each with its own KV heads."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from tests.serving.batches import attend_piece

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.launches import make_launch
from llama_surgery.serving.paged import PagedStates, Scheduled, filled_blocks, side_bytes
from llama_surgery.serving.sharding import RouterShard, kv_heads_of_rank

KV_HEADS, GROUP, DIM, LENGTH = 4, 2, 16, 300
CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8, theta=0.03, theta_decode=0.02)


def corrections() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "offset": torch.randn(KV_HEADS, GROUP, generator=generator),
        "mean_weight": 1 + 0.2 * torch.randn(KV_HEADS, GROUP, DIM, generator=generator),
        "key_map": torch.eye(DIM) + 0.3 * torch.randn(KV_HEADS, DIM, DIM, generator=generator),
        "summary": 0.5 * torch.randn(KV_HEADS, GROUP, generator=generator),
    }


def layer(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (heads of the rank, rows, dim) of a prompt of LENGTH tokens, and the side cache's moments."""
    generator = torch.Generator().manual_seed(2)
    mine = kv_heads_of_rank(KV_HEADS, rank, ranks)
    queries = 3 * torch.randn(KV_HEADS, GROUP, LENGTH, DIM, generator=generator)[mine]
    keys, values = (torch.randn(KV_HEADS, LENGTH, DIM, generator=generator)[mine] for _ in range(2))
    shard = RouterShard(list(corrections()), KV_HEADS, GROUP, DIM, rank, ranks)
    for name, weight in shard.named_parameters():
        weight.weight_loader(weight, corrections()[name])  # as the engine's loader calls it
    blocks = torch.tensor([3, 1, 5, 2, 4])
    heads = keys.shape[0]
    cache = PagedStates(
        *torch.zeros(2, 6, heads, CONFIG.chunk_size, DIM),
        torch.zeros(6, heads, side_bytes(CONFIG, DIM) // 4),
        CONFIG,
    )
    position = torch.arange(LENGTH)
    slots = blocks[position // CONFIG.chunk_size] * CONFIG.chunk_size + position % CONFIG.chunk_size
    cache.write(keys.transpose(0, 1), values.transpose(0, 1), slots)
    entry = Scheduled(0, LENGTH, 0, True, blocks)
    parts, rows = entry.parts(CONFIG), (keys.transpose(0, 1), values.transpose(0, 1))
    nears = [cache.near(make_launch([(entry, part)], CONFIG, kernels=False), *rows) for part in parts]
    cache.fill(filled_blocks([entry], CONFIG.chunk_size), shard.router())
    given = {"scale": 0.25, "router": shard.router()}
    outs = [
        attend_piece(queries[:, :, part.start : part.stop], near, cache, blocks, part, **given).out
        for part, near in zip(parts, nears, strict=True)
    ]
    return torch.cat(outs, 2).flatten(0, 1), cache.layout(blocks[:4], keys.dtype).moments.mean


def run_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    gathered = []
    for part in layer(rank, ranks):
        parts = [torch.empty_like(part) for _ in range(ranks)]
        dist.all_gather(parts, part.contiguous())
        gathered.append(torch.cat(parts))
    if rank == 0:
        torch.save(gathered, f"{folder}/gathered.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    processes.spawn(run_rank, (2, str(tmp_path)), nprocs=2)
    for got, want in zip(torch.load(tmp_path / "gathered.pt"), layer(0, 1), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [3, 8, 0])
def test_heads_that_cannot_be_dealt_out(ranks: int) -> None:
    with pytest.raises(SurgeryError, match="4 KV heads"):
        kv_heads_of_rank(KV_HEADS, 0, ranks)


def test_unknown_part() -> None:
    with pytest.raises(SurgeryError, match="gates are not served"):
        RouterShard(["gates"], KV_HEADS, GROUP, DIM, 0, 1)

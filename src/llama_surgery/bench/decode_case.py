"""Decode attention at a length: caches with planted pages, what must come out, what must be read.

Which pages a stream opens is fixed by construction: planted pages answer its queries, their number differs
per stream, θ lies in the gap. Shapes are those of an 8-billion-parameter Llama: 32 query, 8 KV heads of 128.
"""

import dataclasses
import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llama_surgery.attention.impl.triton.decode import DecodeResult
from llama_surgery.attention.impl.triton.decode_cache import (
    DecodeCache,
    append_tokens,
    feature_blocks,
    make_cache,
)
from llama_surgery.attention.impl.triton.job import page_features
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import moments_of, pool_channels

KV_HEADS, HEADS, DIM = 8, 4, 128
#: Length of the planted part of a key and of a query.
KEY_PULL, QUERY_PULL = 8.0, 10.0
#: Steps of a step run, and the room that a cache has for them.
STEPS = 1200


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: ``length`` counts the new rows too."""

    length: int
    batch: int
    page: int = 64
    ball: int = 64
    rows: int = 1
    far: float = 0.03

    @property
    def config(self) -> SurgeryConfig:
        return SurgeryConfig(page_size=self.page, moment_size=self.ball, theta_decode=0.01)

    @property
    def start(self) -> int:
        return self.length - self.rows

    @property
    def closed_pages(self) -> int:
        return closed_chunks(self.start, self.config, 1) * self.config.pages_per_chunk

    @property
    def label(self) -> dict[str, object]:
        return {
            "n": self.length, "batch": self.batch, "page": self.page, "balls": self.ball, "rows": self.rows
        }  # fmt: skip


@dataclasses.dataclass
class Layer:
    """One cache, its queries, the next token's keys and values, and the pages its streams will open."""

    cache: DecodeCache
    queries: torch.Tensor
    new: torch.Tensor
    pages: list[torch.Tensor]


def by_slot(blocks: torch.Tensor) -> torch.Tensor:
    """(streams, slots, …) view of a contiguous cache's (sequences, kv_heads, chunks, slots of a chunk, …)."""
    return blocks.flatten(0, 1).flatten(1, 2)


# --- data -------------------------------------------------------------------------------------


def choose_pages(setting: Setting, generator: torch.Generator) -> list[torch.Tensor]:
    """Pages that each stream opens: as many as the density asks for on average, in pairs of siblings."""
    streams, available = setting.batch * KV_HEADS, setting.closed_pages
    weight = torch.randn(streams, generator=generator).mul(0.6).exp()
    wanted = weight / weight.mean() * setting.far * setting.length / setting.page
    chosen = []
    for count in wanted.round().long().clamp(2, available).tolist():
        pair = torch.randperm(available // 2 - 1, generator=generator)[: count // 2] + 1
        pages = (pair[:, None] * 2 + torch.arange(2)).flatten()[: count - 1]
        chosen.append(torch.cat((torch.zeros(1, dtype=torch.long), pages)))
    return chosen


def make_layer(setting: Setting, lengths: torch.Tensor, dtype: torch.dtype, seed: int) -> Layer:
    """A full cache with planted pages. Page 0 is the sink page, open without being planted."""
    config, device = setting.config, lengths.device
    streams = setting.batch * KV_HEADS
    room = -(-(setting.length + STEPS) // config.chunk_size) * config.chunk_size
    cache = make_cache(
        config, setting.batch, KV_HEADS, room, DIM, dtype=dtype, device=device, lengths=lengths
    )
    generator = torch.Generator(device).manual_seed(seed)
    pages = choose_pages(setting, torch.Generator().manual_seed(seed))
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    pull = torch.randn(streams, DIM, generator=generator, device=device)
    pull = pull / pull.norm(dim=-1, keepdim=True)
    full = setting.start // config.chunk_size * config.chunk_size
    keys, means, spreads = (by_slot(x) for x in (cache.keys, cache.means, cache.spreads))
    for stream, planted in enumerate(pages):
        by_page = keys[stream].unflatten(0, (-1, setting.page))
        by_page[planted[1:].to(device)] += (KEY_PULL * pull[stream]).to(dtype)
        moments = moments_of(keys[stream : stream + 1, :full], config.ball_size)
        features = page_features(moments, config.alpha, dtype, config.variance_pool)
        for held, fresh in zip((means, spreads), feature_blocks(features, config, 1), strict=True):
            held[stream, : full // config.ball_size] = by_slot(fresh)[0]
    cache.filled.fill_(full // config.chunk_size)
    shape = (streams, HEADS, setting.rows, DIM)
    queries = torch.randn(shape, generator=generator, device=device) + QUERY_PULL * pull[:, None, None]
    new = torch.randn(2, streams, setting.rows, DIM, generator=generator, device=device)
    return Layer(cache, queries.to(dtype), new.to(dtype), pages)


def place_theta(setting: Setting, layers: list[Layer]) -> tuple[float, float]:
    """θ between the shares of pages to be opened and of all others, and the factor between the two."""
    least, most = math.inf, -math.inf
    config = setting.config
    balls = setting.closed_pages * config.balls_per_page
    for layer in layers:
        cache = layer.cache
        keys, means, spreads = (by_slot(x) for x in (cache.keys, cache.means, cache.spreads))
        for stream, planted in enumerate(layer.pages):
            q = layer.queries[stream].flatten(0, 1).float() * DIM**-0.5
            mean, spread = means[stream, :balls].float(), spreads[stream, :balls].float()
            scores = q @ mean.T + pool_channels(q.square(), config.variance_pool) @ spread.T
            scores = scores + math.log(config.ball_size)
            scores = scores.unflatten(-1, (-1, config.balls_per_page)).logsumexp(-1)
            near = keys[stream, setting.closed_pages * setting.page : setting.length]
            total = torch.cat((scores, q @ near.float().T), -1).logsumexp(-1, keepdim=True)
            share = (scores - total).unflatten(0, (HEADS, -1)).amax(0)
            opened = torch.zeros(setting.closed_pages, dtype=torch.bool, device=q.device)
            opened[planted.to(q.device)] = True
            most = max(most, float(share[:, ~opened].max()))
            opened[0] = False
            least = min(least, float(share[:, opened].min()))
    if least - most < math.log(4.0):
        raise SurgeryError(f"{setting}: planted pages do not stand out ({least:.2f} against {most:.2f})")
    return math.exp((least + most) / 2), math.exp(least - most)


def build(
    setting: Setting, copies: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Layer], float]:
    """Caches with one length tensor, as those of a model's layers, with θ in place; and θ's gap."""
    lengths = torch.full((setting.batch,), setting.start, dtype=torch.int32, device=device)
    layers = [make_layer(setting, lengths, dtype, seed) for seed in range(copies)]
    for layer in layers:
        append_tokens(layer.cache, *layer.new)
    theta, gap = place_theta(setting, layers)
    config = dataclasses.replace(setting.config, theta_decode=theta)
    return [dataclasses.replace(x, cache=dataclasses.replace(x.cache, config=config)) for x in layers], gap


# --- checks and accounting --------------------------------------------------------------------


def check(setting: Setting, layer: Layer, result: DecodeResult, samples: int = 4) -> tuple[float, float]:
    """Counts of all streams; of some, the error against float64 on the chosen pages, and plain PyTorch's."""
    counts = torch.tensor([len(p) for p in layer.pages], device=result.opened.device)
    if not (result.opened == counts[:, None]).all():
        raise SurgeryError(f"{setting}: wrong pages, {result.opened[:, 0].tolist()} for {counts.tolist()}")
    streams, worst, plain = len(layer.pages), 0.0, 0.0
    keys, values = by_slot(layer.cache.keys), by_slot(layer.cache.values)
    near = torch.arange(setting.closed_pages * setting.page, setting.length)
    for stream in range(0, streams, max(1, streams // samples)):
        slots = layer.pages[stream][:, None] * setting.page + torch.arange(setting.page)
        slots = torch.cat((slots.flatten(), near)).to(counts.device)
        k, v = (x[stream, slots].expand(HEADS, -1, -1) for x in (keys, values))
        position = setting.start + torch.arange(setting.rows, device=counts.device)
        visible = (slots < setting.closed_pages * setting.page) | (slots <= position[:, None])
        q = layer.queries[stream]
        exact, rough = (sdpa(q.to(t), k.to(t), v.to(t), visible).double() for t in (torch.float64, q.dtype))
        worst = max(worst, float((result.out[stream].double() - exact).norm() / exact.norm()))
        plain = max(plain, float((rough - exact).norm() / exact.norm()))
    if not worst <= 1.5 * plain + 1e-5:
        raise SurgeryError(f"{setting}: wrong answer, error {worst:.2e}, plain low precision {plain:.2e}")
    return worst, plain


def check_dense(setting: Setting, layer: Layer, out: torch.Tensor) -> None:
    """A rival's output (streams, heads, DIM) of a single row, against float32."""
    for stream in range(0, len(layer.pages), max(1, len(layer.pages) // 2)):
        k, v = (by_slot(x)[stream, : setting.length].float() for x in (layer.cache.keys, layer.cache.values))
        q = layer.queries[stream, :, 0].float()
        exact = (q @ k.T * DIM**-0.5).softmax(-1) @ v
        error = float((out[stream].float() - exact).norm() / exact.norm())
        if not error < 0.02:
            raise SurgeryError(f"{setting}: a rival's error is {error:.2e}")


def bytes_of(setting: Setting, results: list[DecodeResult]) -> float:
    """Bytes that a call must move: pages read, moments, near field; scores written and read."""
    size, streams = results[0].out.element_size(), setting.batch * KV_HEADS
    blocks = -(-setting.rows // results[0].rows_block)
    pages = sum(float(r.read[:, :: r.rows_block].sum()) for r in results) / len(results)
    near = setting.length - setting.closed_pages * setting.page
    keys = pages * setting.page + streams * blocks * (
        near + setting.closed_pages * setting.page / setting.ball
    )
    scores = 2 * 4 * streams * setting.rows * HEADS * setting.closed_pages
    return keys * 2 * DIM * size + scores


def facts_of(setting: Setting, results: list[DecodeResult]) -> dict[str, Any]:
    """Counts and densities of what was really read."""
    read = torch.cat([r.read.flatten() for r in results]).float().sort().values
    far = float(read.mean()) * setting.page / setting.length
    near = setting.length - setting.closed_pages * setting.page
    return {
        "pages_p50": float(read[len(read) // 2]),
        "pages_p95": float(read[int(0.95 * (len(read) - 1))]),
        "executed_far": far,
        "total_density": far + near / setting.length,
    }

"""Decode attention at a length: caches with planted pages, what must come out, what must be read.

Which pages a stream opens is fixed by construction: planted pages answer its queries, their number differs
per stream, θ lies in the gap. Shapes are those of an 8-billion-parameter Llama: 32 query, 8 KV heads of 128.
"""

import dataclasses
import math
from typing import Any

import torch

from llama_surgery.attention.impl.triton.decode.cache import DecodeCache, append_tokens
from llama_surgery.attention.impl.triton.decode.launch import DecodeResult
from llama_surgery.attention.impl.triton.job import KeptMoments
from llama_surgery.attention.summary import summary_logits
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.decoding import cache_view
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout, mean_values, moments_of
from llama_surgery.topology.selection import Scorer

from .states import plain_attention

KV_HEADS, HEADS, DIM = 8, 4, 128
#: Length of the planted part of a key, and logit that it gets from the planted part of a query.
KEY_PULL, LOGIT = 8.0, 9.9
#: Least factor between the shares of planted pages and of others: rounding moves a share by some percent.
GAP = 4.0

#: Steps of a step run, and the room that a cache has for them.
STEPS = 1200


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        length: Tokens of the longest sequence, the new rows included; of all, unless ``ragged``.
        batch: Sequences.
        page: Keys of a page.
        rows: New rows of a sequence.
        far: Far density.
        ragged: Lengths of the others go down from ``length`` by equal factors, to a 128th of it.
    """

    length: int
    batch: int
    page: int = 64
    rows: int = 1
    far: float = 0.03
    ragged: bool = False

    @property
    def config(self) -> SurgeryConfig:
        return SurgeryConfig(page_size=self.page, theta_decode=0.01, backend="triton")

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        if not self.ragged:
            return [self.length] * self.batch
        share = 7.0 / max(1, self.batch - 1)
        return [round(self.length * 2.0 ** -(share * index)) for index in range(self.batch)]

    @property
    def start(self) -> int:
        """Position of the longest sequence's first new row."""
        return self.length - self.rows

    def pages(self, length: int) -> int:
        """Closed pages of a sequence of ``length`` tokens."""
        return closed_chunks(length - self.rows, self.config, 1) * self.config.pages_per_chunk

    def near(self, length: int) -> int:
        """Tokens of its near field."""
        return length - self.pages(length) * self.page

    def streams(self) -> list[int]:
        """Length of every stream."""
        return [length for length in self.lengths for _ in range(KV_HEADS)]

    @property
    def label(self) -> dict[str, object]:
        return {
            "n": self.length, "batch": self.batch, "page": self.page, "rows": self.rows,
            "ragged": self.ragged,
        }  # fmt: skip


@dataclasses.dataclass
class Layer:
    """One cache, its queries, the next token's keys and values, and the pages its streams will open.

    Attributes:
        buffers: What ``cache`` is a view of.
    """

    buffers: PageBuffers
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
    lengths = setting.streams()
    weight = torch.randn(len(lengths), generator=generator).mul(0.6).exp()
    weight = weight / weight.mean()
    chosen = []
    for length, more in zip(lengths, weight.tolist(), strict=True):
        available = setting.pages(length)
        count = min(max(round(more * setting.far * length / setting.page), 4), available)
        pair = torch.randperm(max(0, available // 2 - 1), generator=generator)[: count // 2] + 1
        pages = (pair[:, None] * 2 + torch.arange(2)).flatten()[: max(0, count - 1)]
        chosen.append(torch.cat((torch.zeros(min(1, available), dtype=torch.long), pages)))
    return chosen


def make_layer(setting: Setting, lengths: torch.Tensor, dtype: torch.dtype, seed: int) -> Layer:
    """A full cache with planted pages. Page 0 is the sink page, open without being planted."""
    config, device = setting.config, lengths.device
    streams = setting.batch * KV_HEADS
    buffers = PageBuffers(config, streams, device)
    buffers.maximum = setting.length + (0 if setting.ragged else STEPS)
    buffers.reserve(buffers.maximum)
    generator = torch.Generator(device).manual_seed(seed)
    pages = choose_pages(setting, torch.Generator().manual_seed(seed))
    pull = torch.randn(streams, DIM, generator=generator, device=device)
    pull = pull / pull.norm(dim=-1, keepdim=True)
    for index, length in enumerate(setting.lengths):
        own = slice(index * KV_HEADS, (index + 1) * KV_HEADS)
        settled = length - setting.rows
        full = settled // config.chunk_size * config.chunk_size
        keys, values = (
            torch.randn(KV_HEADS, settled, DIM, generator=generator, device=device, dtype=dtype)
            for _ in range(2)
        )
        for head, planted in enumerate(pages[own]):
            by_page = keys[head, :full].unflatten(0, (-1, setting.page))
            by_page[planted[1:].to(device)] += (KEY_PULL * pull[own][head]).to(dtype)
        if full:  # in the order in which keys were planted: no tree is built
            order = torch.arange(config.chunk_size, dtype=torch.int16, device=device)
            order = order.expand(KV_HEADS, full // config.chunk_size, -1)
            moments = moments_of(keys[:, :full], config.page_size)
            means = mean_values(values[:, :full], config)
            layout = Layout(keys[:, :full], values[:, :full], order, moments, mean_values=means)
            buffers.write_chunks(own, 0, layout)
        buffers.write(own, full, keys[:, full:], values[:, full:])
    cache = cache_view(buffers, config, KV_HEADS, lengths)
    shape = (streams, HEADS, setting.rows, DIM)
    planted_query = LOGIT * DIM**0.5 / KEY_PULL * pull[:, None, None]
    queries = torch.randn(shape, generator=generator, device=device) + planted_query
    new = torch.randn(2, streams, setting.rows, DIM, generator=generator, device=device)
    return Layer(buffers, cache, queries.to(dtype), new.to(dtype), pages)


def place_theta(setting: Setting, layers: list[Layer]) -> tuple[float, float]:
    """θ between the shares of pages to be opened and of all others, and the factor between the two."""
    least, most = math.inf, -math.inf
    config, lengths = setting.config, setting.streams()
    for layer in layers:
        cache = layer.cache
        keys, features = by_slot(cache.keys), by_slot(cache.features)
        for stream, planted in enumerate(layer.pages):
            length, pages = lengths[stream], setting.pages(lengths[stream])
            if len(planted) == pages:  # nothing is to stay closed, or there is nothing
                continue
            q = layer.queries[stream].flatten(0, 1).float() * DIM**-0.5
            moments = KeptMoments(features[stream, None, :pages], config.page_size)
            scores, weights = Scorer(1.0)(q[None], moments)
            scores, weights = scores[0], weights[0]
            near = keys[stream, length - setting.near(length) : length]
            total = torch.cat((weights, q @ near.float().T), -1).logsumexp(-1, keepdim=True)
            share = (scores - total).unflatten(0, (HEADS, -1)).amax(0)
            opened = torch.zeros(pages, dtype=torch.bool, device=q.device)
            opened[planted.to(q.device)] = True
            most = max(most, float(share[:, ~opened].max()))
            opened[0] = False
            least = min(least, float(share[:, opened].min()))
    if least - most < math.log(GAP):
        raise SurgeryError(f"{setting}: planted pages do not stand out ({least:.2f} against {most:.2f})")
    return math.exp((least + most) / 2), math.exp(least - most)


def build(
    setting: Setting, copies: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Layer], float]:
    """Caches with one length tensor, as those of a model's layers, with θ in place; and θ's gap."""
    lengths = torch.tensor(setting.lengths, dtype=torch.int32, device=device) - setting.rows
    layers = [make_layer(setting, lengths, dtype, seed) for seed in range(copies)]
    for layer in layers:
        append_tokens(layer.cache, *layer.new)
    theta, gap = place_theta(setting, layers)
    config = dataclasses.replace(setting.config, theta_decode=theta)
    return [dataclasses.replace(x, cache=dataclasses.replace(x.cache, config=config)) for x in layers], gap


# --- checks and accounting --------------------------------------------------------------------


def check(setting: Setting, layer: Layer, result: DecodeResult, samples: int = 4) -> tuple[float, float]:
    """Counts of all streams; of some, the error against float64, and plain PyTorch's.

    Both read the chosen pages, and the means of the others.
    """
    counts = torch.tensor([len(p) for p in layer.pages], device=result.opened.device)
    if not (result.opened == counts[:, None]).all():
        raise SurgeryError(f"{setting}: wrong pages, {result.opened[:, 0].tolist()} for {counts.tolist()}")
    streams, worst, plain = len(layer.pages), 0.0, 0.0
    keys, values = by_slot(layer.cache.keys), by_slot(layer.cache.values)
    lengths = setting.streams()
    for stream in range(0, streams, max(1, streams // samples)):
        length = lengths[stream]
        closed = length - setting.near(length)
        slots = layer.pages[stream][:, None] * setting.page + torch.arange(setting.page)
        slots = torch.cat((slots.flatten(), torch.arange(closed, length))).to(counts.device)
        position = length - setting.rows + torch.arange(setting.rows, device=counts.device)
        visible = (slots < closed) | (slots <= position[:, None])
        q = layer.queries[stream]
        given = (q, keys[stream, slots], values[stream, slots], visible, *_unread(layer, stream, closed))
        exact, rough = (plain_attention(*given, DIM**-0.5, dtype) for dtype in (torch.float64, q.dtype))
        worst = max(worst, float((result.out[stream].double() - exact).norm() / exact.norm()))
        plain = max(plain, float((rough - exact).norm() / exact.norm()))
    if not worst <= 1.5 * plain + 1e-5:
        raise SurgeryError(f"{setting}: wrong answer, error {worst:.2e}, plain low precision {plain:.2e}")
    return worst, plain


def _unread(layer: Layer, stream: int, closed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (heads, rows, pages) of what stands in for the first ``closed`` keys, and mean values."""
    cache = layer.cache
    pages = closed // cache.config.page_size
    moments = KeptMoments(by_slot(cache.features)[stream, None, :pages], cache.config.page_size)
    logits = summary_logits(layer.queries[stream, None], moments, Scorer(DIM**-0.5))[0]
    logits[..., layer.pages[stream].to(logits.device)] = -math.inf
    assert cache.mean_values is not None
    return logits, by_slot(cache.mean_values)[stream, :pages]


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
    """Bytes that a call must move: pages read, moments, mean values, near field; logits of pages twice."""
    size, lengths = results[0].out.element_size(), setting.streams()
    blocks = -(-setting.rows // results[0].rows_block)
    pages = sum(float(r.read[:, :: r.rows_block].sum()) for r in results) / len(results)
    closed, near = (sum(map(count, lengths)) for count in (setting.pages, setting.near))
    keys = pages * setting.page + blocks * (near + closed * 1.5)
    logits = 2 * 2 * 4 * setting.rows * HEADS * closed  # of scores, and of what stands in
    return keys * 2 * DIM * size + logits


def facts_of(setting: Setting, results: list[DecodeResult]) -> dict[str, Any]:
    """Counts and densities of what was really read."""
    read = torch.cat([r.read.flatten() for r in results]).float().sort().values
    lengths = setting.streams()
    mean = sum(lengths) / len(lengths)
    far = float(read.mean()) * setting.page / mean
    summaries = sum(map(setting.pages, lengths)) / 2 / sum(lengths)
    return {
        "pages_p50": float(read[len(read) // 2]),
        "pages_p95": float(read[int(0.95 * (len(read) - 1))]),
        "executed_far": far,
        "summary_density": summaries,
        "total_density": far + sum(map(setting.near, lengths)) / sum(lengths) + summaries,
    }

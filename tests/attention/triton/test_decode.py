"""Decode kernels against the reference: ragged batches, groups, head dims, several rows, filling chunks."""

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.attention.triton.decode_caches import Sequence, loaded

from llama_surgery.attention import api
from llama_surgery.attention.impl.triton.decode.cache import DecodeCache, append_tokens
from llama_surgery.attention.impl.triton.decode.launch import DecodeResult, decode
from llama_surgery.attention.impl.triton.decode.tuning import DecodeTuning, open_splits
from llama_surgery.attention.impl.triton.layout.launch import build_layout as kernel_layout
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.layout import Layout, build_layout
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.06, theta_decode=0.02)


@dataclasses.dataclass
class Case:
    """Sequences of ``lengths`` settled tokens, then ``rows`` new ones each."""

    lengths: tuple[int, ...]
    rows: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sink: bool = False
    sharpness: float = 2.0


@dataclasses.dataclass
class Text:
    """One sequence: queries (kv_heads, heads, rows, dim) of the new rows, all keys and values."""

    length: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    layout: Layout | None


def make_texts(
    case: Case, config: SurgeryConfig, device: torch.device, router: PageRouter | None = None
) -> list[Text]:
    generator = torch.Generator().manual_seed(sum(case.lengths) + 7 * case.rows + case.heads + case.dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    texts = []
    for length in case.lengths:
        keys = normal(case.kv_heads, length + case.rows, case.dim)
        values = normal(case.kv_heads, length + case.rows, case.value_dim)
        full = length // config.chunk_size * config.chunk_size
        layout = build_layout(keys[:, :full], values[:, :full], config, router) if full else None
        queries = case.sharpness * normal(case.kv_heads, case.heads, case.rows, case.dim)
        texts.append(Text(length, queries, keys, values, layout))
    return texts


def loaded_cache(texts: list[Text], case: Case, config: SurgeryConfig) -> DecodeCache:
    """A cache that holds all but the new rows, NaN behind them."""
    return loaded(config, [settled(text, config) for text in texts], max(case.lengths) + case.rows)[1]


def settled(text: Text, config: SurgeryConfig) -> Sequence:
    """All but the new rows of a text."""
    full = 0 if text.layout is None else text.layout.chunks * config.chunk_size
    return text.layout, text.keys[:, full : text.length], text.values[:, full : text.length]


def append(cache: DecodeCache, texts: list[Text]) -> None:
    """Write the new rows of all texts."""
    append_tokens(
        cache,
        torch.cat([t.keys[:, t.length :] for t in texts]),
        torch.cat([t.values[:, t.length :] for t in texts]),
    )


def run(
    case: Case,
    config: SurgeryConfig,
    device: torch.device,
    tuning: DecodeTuning | None = None,
    router: PageRouter | None = None,
    *,
    whole: bool = False,
) -> tuple[DecodeResult, list[AttentionResult]]:
    """The kernels' result and, for every sequence, the reference's; ``whole``: nothing is known of pages."""
    texts = make_texts(case, config, device, router)
    cache = loaded_cache(texts, case, config)
    if whole:
        cache = dataclasses.replace(cache, features=None, sink_page=None, mean_values=None)
    append(cache, texts)
    sink = None
    if case.sink:
        generator = torch.Generator().manual_seed(3)
        sink = torch.randn(len(texts) * case.kv_heads, case.heads, generator=generator).to(device)
    result = decode(
        torch.cat([t.queries for t in texts]),
        cache,
        softcap=case.softcap,
        sink_logit=sink,
        router=router,
        tuning=tuning,
    )
    oracle = dataclasses.replace(config, backend="reference")
    expected = [
        api.attend(
            text.queries,
            text.keys,
            text.values,
            text.layout,
            config=oracle,
            start=text.length,
            tile=1,
            softcap=case.softcap,
            sink_logit=None if sink is None else sink.unflatten(0, (-1, case.kv_heads))[index],
            router=router,
        )
        for index, text in enumerate(texts)
    ]
    return result, expected


def check(
    case: Case,
    config: SurgeryConfig,
    device: torch.device,
    tuning: DecodeTuning | None = None,
    router: PageRouter | None = None,
) -> DecodeResult:
    """Same pages and the same attention to rounding."""
    result, expected = run(case, config, device, tuning, router)
    for index, wanted in enumerate(expected):
        streams = slice(index * case.kv_heads, (index + 1) * case.kv_heads)
        torch.testing.assert_close(result.out[streams], wanted.out, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(result.lse[streams], wanted.lse, rtol=2e-5, atol=2e-5)
        counts = torch.zeros_like(result.opened[streams])
        for plan in wanted.plans:
            first = plan.block.start - case.lengths[index]
            counts[:, first : first + plan.counts.shape[1]] = plan.counts
        assert torch.equal(result.opened[streams], counts)
    assert (result.read >= result.opened).all()
    if result.rows_block == 1:
        assert torch.equal(result.read, result.opened)
    return result


@pytest.mark.usefixtures("poisoned")
class TestAgainstReference:
    @pytest.mark.parametrize("length", [0, 63, 64, 95, 96, 640])
    def test_lengths(self, length: int, device: torch.device) -> None:
        result = check(Case((length,)), CONFIG, device)
        assert bool(result.opened.sum()) == (length >= 96)

    def test_a_ragged_batch(self, device: torch.device) -> None:
        check(Case((300, 0, 97, 64, 511)), CONFIG, device)

    @pytest.mark.parametrize("rows", [2, 3, 8])
    def test_rows_that_cross_borders(self, rows: int, device: torch.device) -> None:
        # Where a chunk fills, where one closes, and in the middle of nothing.
        check(Case((190, 285, 350), rows), CONFIG, device)

    @pytest.mark.parametrize(("heads", "rows"), [(1, 1), (1, 3), (3, 5), (12, 8), (7, 2), (16, 1), (40, 2)])
    def test_groups(self, heads: int, rows: int, device: torch.device) -> None:
        check(Case((270,), rows, heads, kv_heads=1), CONFIG, device)

    @pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 64), (256, 256)])
    def test_head_dims(self, dim: int, value_dim: int, device: torch.device) -> None:
        check(Case((300,), 2, 2, 1, dim, value_dim), CONFIG, device)

    def test_sharp_heads(self, device: torch.device) -> None:
        """Most balls' variance terms are beyond what their keys can reach."""
        config = CONFIG
        check(Case((300, 400), 2, sharpness=12.0), config, device)
        check(Case((300, 97), 2, softcap=20.0, sharpness=12.0), config, device)

    @pytest.mark.parametrize("summary", ["none", "page"])
    def test_summaries(self, summary: str, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, summary=summary)
        check(Case((300, 97, 20, 511)), config, device)
        check(Case((190, 350), 3, 3, dim=40, softcap=3.0, sink=True), config, device)
        few = dataclasses.replace(config, theta_decode=0.9)
        check(Case((330,), 8, 12, 1, dim=16, value_dim=24), few, device, DecodeTuning(step_bytes=1))

    @pytest.mark.parametrize("sink", [False, True])
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_caps_and_sinks(self, sink: bool, softcap: float | None, device: torch.device) -> None:
        check(Case((300, 20), 3, softcap=softcap, sink=sink), CONFIG, device)

    def test_a_threshold_that_falls(self, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, theta_decode=0.3, theta_length=320)
        case = Case((300, 316, 511, 1000), 3)
        read = [
            check(case, dataclasses.replace(config, theta_length=length), device).opened.sum()
            for length in (320, 0)
        ]
        assert read[0] > read[1]

    def test_rows_on_both_sides_of_dense_until(self, device: torch.device) -> None:
        check(Case((300, 316, 320), 4), dataclasses.replace(CONFIG, dense_until=320), device)

    def test_dense_everywhere(self, device: torch.device) -> None:
        result = check(Case((300, 5), 2), dataclasses.replace(CONFIG, dense_until=1 << 20), device)
        assert not result.read.any()

    def test_everything_open_is_dense(self, device: torch.device) -> None:
        case = Case((300, 129), 2)
        opened = check(case, dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0), device)
        dense = check(case, dataclasses.replace(CONFIG, dense_until=1 << 20), device)
        torch.testing.assert_close(opened.out, dense.out, rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize(
        "case",
        [
            Case((300, 0, 97, 64, 511)),
            Case((190, 350), 8, 3, dim=40, softcap=3.0, sink=True),
            Case((640,), 2, 7, 1, 24, 40),
        ],
    )
    def test_where_nothing_is_known_of_pages_everything_is_seen(
        self, case: Case, device: torch.device
    ) -> None:
        config = dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0)
        result, expected = run(case, config, device, whole=True)
        for name in ("out", "lse"):
            wanted = torch.cat([getattr(text, name) for text in expected])
            torch.testing.assert_close(getattr(result, name), wanted, rtol=2e-5, atol=2e-5)
        assert not result.opened.any() and not result.read.any()

    def test_sizes_that_are_no_powers_of_two(self, device: torch.device) -> None:
        config = SurgeryConfig(chunk_size=192, page_size=24, window=24, tile=12, theta=0.03)
        check(Case((500, 239), 3, 3, 2, 24, 40), dataclasses.replace(config, theta_decode=0.03), device)
        check(Case((500, 239), 3, 3, 2, 24, 40), config, device)

    @pytest.mark.parametrize("programs", [1, 30])
    @pytest.mark.parametrize("step_bytes", [1, 1 << 13])
    def test_launches(self, programs: int, step_bytes: int, device: torch.device) -> None:
        tuning = DecodeTuning(step_bytes=step_bytes, programs=programs)
        config = dataclasses.replace(CONFIG, page_size=32)
        check(Case((900, 130), 2), config, device, tuning)

    def test_a_word_of_pages_and_more(self, device: torch.device) -> None:
        config = SurgeryConfig(
            chunk_size=64, page_size=4, window=16, tile=16, theta=0.002, theta_decode=0.002
        )
        check(Case((700,), 2, 2, 1), config, device, DecodeTuning(programs=1))

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(0, 420), min_size=1, max_size=3),
        rows=st.integers(1, 8),
        heads=st.integers(1, 5),
        theta=st.sampled_from([0.0, 0.005, 0.03, 0.3]),
    )
    def test_anything(
        self, lengths: list[int], rows: int, heads: int, theta: float, device: torch.device
    ) -> None:
        config = dataclasses.replace(CONFIG, theta=max(theta, 0.06), theta_decode=theta)
        check(Case(tuple(lengths), rows, heads, 1), config, device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    case = Case((300,), 4, dtype=dtype)
    config = dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0)
    result, _ = run(case, config, device)
    assert result.out.dtype == dtype
    text = make_texts(case, config, device)[0]
    visible = torch.ones(4, 304, dtype=torch.bool, device=device).tril(300)
    # A key for every head: of keys that are shared by broadcasting, PyTorch's GPU kernels know nothing, and
    # what it takes instead computes in float32.
    keys, values = (x[:, None].expand(-1, case.heads, -1, -1).contiguous() for x in (text.keys, text.values))
    exact, plain = (
        torch.nn.functional.scaled_dot_product_attention(
            text.queries.to(kind), keys.to(kind), values.to(kind), visible
        )
        for kind in (torch.float64, dtype)
    )
    assert (result.out.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("chunk_size", "page_size"), [(64, 16), (48, 12)])
def test_blocks_may_lie_anywhere(rows: int, chunk_size: int, page_size: int, device: torch.device) -> None:
    """The same chunks, shuffled in one pool of blocks behind a table: the same numbers, bit by bit."""
    sizes = {"chunk_size": chunk_size, "page_size": page_size}
    config = dataclasses.replace(CONFIG, **sizes)
    case = Case((250, 0, 97, 191), rows, dim=24)
    texts = make_texts(case, config, device)
    cache = loaded_cache(texts, case, config)
    sequences = len(texts)
    order = torch.randperm(sequences * cache.chunks, generator=torch.Generator().manual_seed(1)).to(device)

    def pooled(tensor: torch.Tensor) -> torch.Tensor:
        """(sequences, kv_heads, chunks, …) as one pool, in another order, seen by every sequence."""
        blocks = torch.empty_like(tensor.transpose(0, 1).flatten(1, 2).transpose(0, 1))
        blocks[order] = tensor.transpose(1, 2).flatten(0, 1)
        return blocks.transpose(0, 1).expand(sequences, *blocks.transpose(0, 1).shape)

    paged = dataclasses.replace(
        cache,
        keys=pooled(cache.keys),
        values=pooled(cache.values),
        features=pooled(cache.features),
        sink_page=pooled(cache.sink_page.expand(-1, -1, cache.chunks)),
        mean_values=pooled(cache.mean_values),
        table=order.int().view(sequences, -1),
    )
    queries = torch.cat([t.queries for t in texts])
    results = []
    for each in (cache, paged):
        append(each, texts)
        results.append(decode(queries, each))
    for name in ("out", "lse", "opened", "read"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert results[0].out.isfinite().all() and results[0].opened.any()


def test_rows_are_settled_on_demand(device: torch.device) -> None:
    case = Case((100, 3, 70), 2)
    texts = make_texts(case, CONFIG, device)
    cache = loaded_cache(texts, case, CONFIG)
    queries = torch.cat([t.queries for t in texts])
    append(cache, texts)
    for advance, lengths in ((False, [100, 3, 70]), (True, [102, 5, 72])):
        decode(queries, cache, advance=advance)
        assert cache.lengths.tolist() == lengths


@pytest.mark.usefixtures("poisoned")
def test_texts_grow_by_accepted_drafts(device: torch.device) -> None:
    """Two sequences of different lengths, of whose new tokens some are rejected; chunks filled when due."""
    config = SurgeryConfig(chunk_size=32, page_size=8, window=8, tile=8, theta=0.06, theta_decode=0.04)
    rows, last = 4, 110
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(2, last, 16, generator=generator).to(device) for _ in range(2))
    queries = 2 * torch.randn(2, 2, last, 16, generator=generator).to(device)
    oracle, position, step = dataclasses.replace(config, backend="reference"), [29, 1], 0
    past_of = [(None, keys[i : i + 1, :n], values[i : i + 1, :n]) for i, n in enumerate(position)]
    buffers, cache = loaded(config, past_of, 128)
    stores = [SequenceStore(buffers.config, buffers, slice(i, i + 1), n) for i, n in enumerate(position)]

    @functools.cache
    def layout_of(stream: int, full: int) -> Layout:
        """By the same kernels: elsewhere keys may tie to rounding and change places."""
        return kernel_layout(keys[stream : stream + 1, :full], values[stream : stream + 1, :full], config)

    while max(position) + rows <= last:
        new = torch.tensor([[p + r for r in range(rows)] for p in position], device=device)
        of = torch.arange(2, device=device)[:, None]
        append_tokens(cache, keys[of, new], values[of, new])
        result = decode(queries.transpose(1, 2)[of, new].transpose(1, 2), cache)
        for stream, start in enumerate(position):
            full, stop = start // 32 * 32, start + rows
            past = slice(stream, stream + 1)
            expected = api.attend(
                queries[past, :, start:stop],
                keys[past, :stop],
                values[past, :stop],
                layout_of(stream, full) if full else None,
                config=oracle,
                start=start,
                tile=1,
            )
            torch.testing.assert_close(result.out[past], expected.out, rtol=3e-5, atol=3e-5)
        kept = torch.tensor([2 + step % 3, 2 + (step + 1) % 3], dtype=torch.int32, device=device)
        cache.lengths.add_(kept)
        for index, (store, count) in enumerate(zip(stores, kept.tolist(), strict=True)):
            position[index] += count
            store.length += count
            store.lay_out()
        step += 1


def test_pages_at_one_place_of_their_chunks_are_spread() -> None:
    config = SurgeryConfig(page_size=64)
    for streams in (1, 8, 64, 512):
        splits = open_splits(config, 2048, streams, 132, DecodeTuning())
        taken = {page % splits for page in range(0, 2048, config.pages_per_chunk)}
        assert len(taken) == min(splits, 2048 // config.pages_per_chunk)
        # Enough programs to fill a GPU, short lists where there are few of them, not too many in all.
        assert splits * streams >= min(4 * 132, streams * 128)
        assert splits >= (32 if streams <= 64 else 8) and splits * streams < 5000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_follows_the_length(device: torch.device) -> None:
    case = Case((290,), 1)
    text = make_texts(case, CONFIG, device)[0]
    cache = loaded_cache([text], Case((290,), 3), CONFIG)

    def step() -> DecodeResult:
        append_tokens(cache, text.keys[:, 290:], text.values[:, 290:])
        return decode(text.queries, cache, advance=True)

    eager = step()
    cache.lengths.sub_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured.out, eager.out)
    graph.replay()
    assert cache.lengths.tolist() == [292] and not torch.equal(captured.out, eager.out)


class TestWhatIsRefused:
    def refused(self, message: str, device: torch.device, case: Case, **change: object) -> None:
        config = dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
        with pytest.raises(SurgeryError, match=message):
            run(case, config, device)

    def test_nine_rows(self, device: torch.device) -> None:
        self.refused("9 rows", device, Case((100,), 9))

    def test_more_rows_than_the_window_guards(self, device: torch.device) -> None:
        self.refused("window=0", device, Case((100,), 2), window=0)

    def test_shapes(self, device: torch.device) -> None:
        case = Case((40,))
        texts = make_texts(case, CONFIG, device)
        cache, queries = loaded_cache(texts, case, CONFIG), texts[0].queries
        with pytest.raises(SurgeryError, match="do not fit cached keys"):
            decode(queries[:1], cache)
        with pytest.raises(SurgeryError, match=r"torch\.float16"):
            decode(queries.half(), cache)
        with pytest.raises(SurgeryError, match="sink_logit"):
            decode(queries, cache, sink_logit=torch.zeros(2, 1, device=device))

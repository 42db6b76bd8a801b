"""Learned corrections in the kernels: every part alone and all of them, against the reference."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton import test_decode, test_prefill
from tests.attention.triton.decode_caches import loaded
from tests.attention.triton.test_prefill import Case, check, inputs

from llama_surgery.attention import api
from llama_surgery.attention.impl.triton.decode.cache import append_tokens
from llama_surgery.attention.impl.triton.layout.launch import build_layout
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.router import PageRouter

#: A θ high enough for pages to stay closed.
CONFIG = dataclasses.replace(test_prefill.CONFIG, theta=0.2, theta_decode=0.1)


def learned(kv_heads: int, group: int, dim: int, device: torch.device) -> PageRouter:
    """Corrections of every kind, far from neutral, some weights negative."""
    generator = torch.Generator().manual_seed(kv_heads + group + dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return PageRouter(
        offset=0.7 * normal(kv_heads, group),
        mean_weight=1 + 0.5 * normal(kv_heads, group, dim),
        variance_weight=1 + 0.8 * normal(kv_heads, group, dim),
        key_map=normal(kv_heads, dim, dim),
        summary=normal(kv_heads, group),
    )


@pytest.mark.usefixtures("poisoned")
class TestAgainstReference:
    def test_each_part_alone(self, device: torch.device) -> None:
        case = Case(24, 150, 4, streams=4)  # two sequences: parts are those of KV heads
        plain = check(case, CONFIG, device).plans[0].rows_seen
        for part in ("offset", "mean_weight", "variance_weight"):
            router = PageRouter(**{part: getattr(learned(2, 4, 16, device), part)})
            assert not torch.equal(check(case, CONFIG, device, router).plans[0].rows_seen, plain), part

    @pytest.mark.parametrize(("heads", "dim", "softcap"), [(3, 40, 3.0), (12, 16, None)])
    def test_all_parts(self, heads: int, dim: int, softcap: float | None, device: torch.device) -> None:
        case = Case(40, 170, heads, dim, streams=1, softcap=softcap, sink=True)
        check(case, CONFIG, device, learned(1, heads, dim, device))

    def test_tiles_of_one_query(self, device: torch.device) -> None:
        check(Case(3, 197, 4, tile=1), CONFIG, device, learned(2, 4, 16, device))

    @pytest.mark.parametrize("summary", ["none", "page"])
    def test_summaries(self, summary: str, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, summary=summary)
        check(Case(40, 170, 4), config, device, learned(2, 4, 16, device))


@pytest.mark.usefixtures("poisoned")
class TestDecodeAgainstReference:
    def test_each_part_alone(self, device: torch.device) -> None:
        case = test_decode.Case((300, 97))
        plain = test_decode.check(case, CONFIG, device).opened
        for part in ("offset", "mean_weight", "variance_weight"):
            router = PageRouter(**{part: getattr(learned(2, 4, 16, device), part)})
            opened = test_decode.check(case, CONFIG, device, router=router).opened
            assert not torch.equal(opened, plain), part

    @pytest.mark.parametrize(("heads", "dim", "softcap"), [(3, 40, 3.0), (12, 16, None)])
    def test_all_parts(self, heads: int, dim: int, softcap: float | None, device: torch.device) -> None:
        case = test_decode.Case((170, 290), 3, heads, 2, dim, softcap=softcap, sink=True)
        test_decode.check(case, CONFIG, device, router=learned(2, heads, dim, device))

    @pytest.mark.parametrize("summary", ["none", "page"])
    def test_summaries(self, summary: str, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, summary=summary)
        test_decode.check(test_decode.Case((170, 290), 2), config, device, router=learned(2, 4, 16, device))


@pytest.mark.usefixtures("poisoned")
def test_a_chunk_that_decoding_fills_is_ordered_by_mapped_keys(device: torch.device) -> None:
    config = CONFIG
    case, router = test_decode.Case((126,), rows=2), learned(2, 4, 16, device)
    text = test_decode.make_texts(case, config, device, router)[0]
    buffers, cache = loaded(config, [test_decode.settled(text, config)], 128)
    append_tokens(cache, text.keys[:, 126:], text.values[:, 126:])
    SequenceStore(buffers.config, buffers, length=128).lay_out(router)
    expected = build_layout(text.keys, text.values, config, router)
    assert torch.equal(cache.keys.flatten(2, 3)[0], expected.keys)
    assert cache.mean_values is not None
    torch.testing.assert_close(cache.mean_values.flatten(2, 3)[0], expected.mean_values)


def test_gradients_by_corrections_are_not_the_kernels_business(device: torch.device) -> None:
    router = PageRouter(summary=torch.zeros(2, 2, device=device, requires_grad=True))
    named = dataclasses.replace(CONFIG, backend="triton")
    given = inputs(Case(40, 120), named, device, router)
    with pytest.raises(SurgeryError, match="no gradients by learned corrections"):
        api.attend(**given, config=named)  # type: ignore[arg-type]
    api.attend(**given, config=dataclasses.replace(named, backend="gather")).out.sum().backward()  # type: ignore[arg-type]
    assert router.summary is not None and router.summary.grad is not None

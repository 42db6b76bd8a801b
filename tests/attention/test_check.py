"""A call whose arguments do not fit together is refused at its entrance, whoever would execute it."""

import dataclasses

import pytest
import torch

from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.attention.api import attend
from llama_surgery.attention.executor import build_layout
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.1, backend="gather")
STREAMS, HEADS, DIM, LENGTH = 4, 2, 16, 80


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layout(config: SurgeryConfig = CONFIG) -> Layout:
    keys = states(STREAMS, 64, DIM)
    return build_layout(keys, keys, config)


def call(given: Layout | None, config: SurgeryConfig = CONFIG, router: PageRouter | None = None):
    keys = states(STREAMS, LENGTH, DIM)
    queries = states(STREAMS, HEADS, 8, DIM)
    return attend(queries, keys, keys, given, config=config, start=LENGTH - 8, router=router)


def test_what_fits_is_executed() -> None:
    weights = torch.ones(2, HEADS, DIM)
    assert call(layout(), router=PageRouter(torch.zeros(2, HEADS), weights, weights)).out.isfinite().all()
    assert call(layout(), router=PageRouter()).out.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: dataclasses.replace(x, keys=x.keys[:2]),
        lambda x: dataclasses.replace(x, keys=x.keys[:, :40]),
        lambda x: dataclasses.replace(x, keys=x.keys[..., :8]),
        lambda x: dataclasses.replace(x, values=x.values[..., :8]),
        lambda x: dataclasses.replace(x, moments=Moments(x.moments.mean, x.moments.variance, 4)),
        lambda x: dataclasses.replace(x, moments=x.moments.first(3)),
    ],
)
def test_layouts_of_other_tensors_are_refused(change) -> None:
    with pytest.raises(SurgeryError, match=r"a layout of 2 chunks, .* was not made for"):
        call(change(layout()))


@pytest.mark.parametrize("change", [{"page_size": 16}, {"chunk_size": 64}])
def test_layouts_of_another_configuration_are_refused(change: dict[str, int]) -> None:
    """A change of page_size changes what its balls are, which the layout's are not."""
    with pytest.raises(SurgeryError, match="it was not made for queries"):
        call(layout(), dataclasses.replace(CONFIG, **change))


def test_layouts_of_another_dtype_are_refused() -> None:
    half = dataclasses.replace(layout(), keys=layout().keys.half(), values=layout().values.half())
    with pytest.raises(
        SurgeryError, match=r"a layout of torch\.float16 on cpu for queries of torch\.float32"
    ):
        call(half)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (PageRouter(offset=torch.zeros(3, HEADS)), "3 KV heads for 4 streams"),
        (PageRouter(offset=torch.zeros(2, 3)), r"router offset \(2, 3\): this layer needs \(2, 2\)"),
        (PageRouter(mean_weight=torch.ones(2, HEADS, 8)), r"mean_weight \(2, 2, 8\)"),
        (PageRouter(torch.zeros(2, HEADS), torch.ones(4, HEADS, DIM)), r"mean_weight \(4, 2, 16\)"),
    ],
)
def test_corrections_of_other_heads_are_refused(router: PageRouter, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        call(layout(), router=router)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (states(2, 40, DIM), states(2, 40, DIM)),
        (states(2, 64, DIM), states(2, 32, DIM)),
        (states(2, 64, DIM), states(1, 64, DIM)),
        (states(2, 0, DIM), states(2, 0, DIM)),
        (states(64, DIM), states(64, DIM)),
    ],
)
def test_only_whole_chunks_are_laid_out(keys: torch.Tensor, values: torch.Tensor) -> None:
    with pytest.raises(SurgeryError, match="whole chunks"):
        build_layout(keys, values, CONFIG)

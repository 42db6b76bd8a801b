"""torch.compile around, inside and before an operation."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.surgery.tiny import SPARSE, build, logits, tokens
from torch import nn

from llama_surgery import (
    SurgeryError,
    UnsupportedModelError,
    eject,
    is_operated,
    operate,
    operated,
    statistics,
)

Compile = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def its_layers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("way", "compiled_first"),
    [
        (its_layers, True),
        pytest.param(wrapped, True, marks=pytest.mark.slow),
        *(pytest.param(way, False, marks=pytest.mark.slow) for way in (wrapped, in_place, its_forward)),
    ],
)
def test_a_compiled_model_is_operated_and_ejected(way: Compile, compiled_first: bool) -> None:
    """Graphs made for the dense model are not run on the operated one, nor the other way round."""
    model, ids = build("Llama", num_hidden_layers=1), tokens(1, 100)
    dense = logits(model, ids)
    with operated(model, SPARSE):
        sparse = logits(model, ids)
    assert not torch.equal(dense, sparse)
    if compiled_first:
        compiled = way(model)
        torch.testing.assert_close(logits(compiled, ids), dense)
        operate(compiled, SPARSE)
    else:
        compiled = way(operate(model, SPARSE))
    for calls in (1, 2):
        torch.testing.assert_close(logits(compiled, ids), sparse)
        assert statistics(compiled).rows == 100 * calls
    assert is_operated(compiled)
    eject(compiled)
    assert not is_operated(model)
    torch.testing.assert_close(logits(compiled, ids), dense)
    # From here on all were compiled first: graphs of both are there, and cost nothing.
    with operated(compiled, SPARSE):
        assert is_operated(model)
        torch.testing.assert_close(logits(compiled, ids), sparse)
    torch.testing.assert_close(logits(compiled, ids), dense)


@pytest.mark.slow
def test_a_compiled_model_notices_another_implementation() -> None:
    model, ids = build("Llama", num_hidden_layers=1), tokens(1, 100)
    compiled = wrapped(operate(model, SPARSE))
    logits(compiled, ids)
    model.set_attn_implementation("eager")
    with pytest.raises(SurgeryError, match=r"eject\(model\) first"):
        logits(compiled, ids)


def test_one_graph_is_refused_with_the_reason() -> None:
    model, ids = build("Llama", num_hidden_layers=1), tokens(1, 100)
    compiled = torch.compile(operate(model, SPARSE), backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"operated layers choose pages.*without fullgraph"
    ):
        logits(compiled, ids)
    eject(model)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


@pytest.mark.parametrize(
    "record",
    [
        lambda model, ids: torch.export.export(model, (ids,), {"use_cache": False}),
        lambda model, ids: torch.jit.trace(lambda given: model(given, use_cache=False).logits, (ids,)),
    ],
    ids=["export", "trace"],
)
def test_a_call_is_not_recorded(record: Callable[[nn.Module, torch.Tensor], object]) -> None:
    """It would be repeated with the pages of other inputs."""
    model, ids = build("Llama"), tokens(1, 100)
    dense = logits(model, ids)
    operate(model, SPARSE)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"choose other pages.*eject\(model\)"):
        record(model, ids)
    assert torch.equal(logits(eject(model), ids), dense)

"""Thresholds for a loss: the search, what it promises on a model, what is kept of it, what is refused."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import llama_surgery as surgery
from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.attention.impl import triton
from llama_surgery.evaluation import loss_budget
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.loss_budget import SEARCH, highest_theta
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.surgery import head_budgets
from llama_surgery.surgery.operation import MeasuredLoss, routers_of, set_config
from llama_surgery.text import windows
from llama_surgery.topology.router import PageRouter

SMALL = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16)


class Curve:
    """A model whose loss is a power of θ, and whose density falls with it."""

    def __init__(self, max_loss: float, slope: float, *, floor: float = 0.0) -> None:
        self.max_loss, self.slope, self.floor = max_loss, slope, floor
        self.tried: list[float] = []

    def __call__(self, theta: float) -> MeasuredLoss:
        self.tried.append(theta)
        loss = self.floor + 0.006 * (theta / 0.05) ** self.slope
        density = min(1.0, 0.1 - 0.12 * math.log(theta))
        return MeasuredLoss(self.max_loss, loss, loss, loss, 1, 1024, density / 2, density)


@pytest.mark.parametrize("slope", [0.6, 1.4, 3.0])
@pytest.mark.parametrize("max_loss", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("start", [0.0, 0.1, 7.0])
def test_the_highest_theta_within_the_limit_is_found_in_few_steps(
    slope: float, max_loss: float, start: float
) -> None:
    curve = Curve(max_loss, slope)
    theta, found = highest_theta(curve, max_loss, start)
    assert found.high <= max_loss and found == curve(theta)
    assert found.high >= 0.8 * max_loss or theta == pytest.approx(math.exp(SEARCH.high))
    assert len(curve.tried) <= 8 and all(
        SEARCH.low - 1e-9 <= math.log(tried) <= SEARCH.high + 1e-9 for tried in curve.tried
    )


@pytest.mark.parametrize("floor", [0.02, 0.0099])
def test_where_only_a_dense_model_keeps_the_limit_the_search_ends_there(floor: float) -> None:
    """Nowhere, or only where nearly everything is read."""
    curve = Curve(0.01, 1.4, floor=floor)
    _, found = highest_theta(curve, 0.01, 0.1)
    assert found.total_density > loss_budget.DENSE and len(curve.tried) <= SEARCH.tries


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path).float().eval()
    return model, AutoTokenizer.from_pretrained(demo_model_path)


def test_the_loss_is_kept_measured_and_told(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_budget, "WINDOWS", 1)
    monkeypatch.setattr(loss_budget, "BLOCK", 64)
    monkeypatch.setattr(loss_budget, "SEARCH", SEARCH._replace(tries=4))
    model, tokenizer = demo
    given = {"text": texts[:2], "tokenizer": tokenizer, "length": 384}
    ids = windows(tokenizer, texts[:2], 384, 1, 0)
    dense = perplexity(model, ids)
    searches: list[MeasuredLoss] = []

    def search(*arguments: Any) -> tuple[float, MeasuredLoss]:
        found = highest_theta(*arguments)
        searches.append(found[1])
        return found

    monkeypatch.setattr(loss_budget, "highest_theta", search)
    with surgery.operated(model, SMALL, max_loss=0.03, **given):
        config, told = surgery.config_of(model), surgery.measured_loss(model)
        assert told is not None and (told.windows, told.length, told.max_loss) == (1, 384, 0.03)
        assert told.low < told.loss < told.high <= 0.03 and config.theta_decode == SMALL.theta_decode
        # One θ for all heads, then with budgets by head: what reads less is taken.
        assert len(searches) == 2 and told in searches
        assert told.total_density == min(s.total_density for s in searches if s.high <= 0.03)
        budgeted = [router.offset is not None for router in routers_of(model).values()]
        assert all(budgeted) if told is searches[1] else not any(budgeted)
        surgery.reset_statistics(model)
        ratio = perplexity_ratio(dense.per_window, perplexity(model, ids).per_window)
        assert ratio.ratio - 1 == pytest.approx(told.loss, abs=1e-4)
        read = surgery.statistics(model)
        assert (read.far_density, read.total_density) == (told.far_density, told.total_density)
        surgery.save_adapter(model, tmp_path)
    surgery.load_adapter(model, tmp_path)
    try:
        assert surgery.measured_loss(model) == told and surgery.config_of(model) == config
        monkeypatch.setattr(triton, "LARGEST_TILE", 8)
        with pytest.raises(SurgeryError, match="tile=16"):
            set_config(model, dataclasses.replace(config, backend="triton"))
        assert surgery.measured_loss(model) == told  # of a change that was refused
        set_config(model, SMALL)  # another θ: what was measured is of another configuration
        assert surgery.measured_loss(model) is None
    finally:
        surgery.eject(model)


def test_budgets_that_were_learned_stay_and_without_gradients_there_are_none(
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no backward pass")

    monkeypatch.setattr(head_budgets, "head_budgets", fail)
    monkeypatch.setattr(loss_budget, "WINDOWS", 1)
    monkeypatch.setattr(loss_budget, "BLOCK", 32)
    monkeypatch.setattr(loss_budget, "DENSE", 1.0)  # random weights open every page
    given = {"text": texts, "tokenizer": tokenizer, "length": 256, "max_loss": 0.5}
    learned = {0: PageRouter(offset=torch.tensor([[0.5, -0.5], [1.0, 0.0]]))}
    with surgery.operated(tiny_llama, SMALL, routers=learned, **given) as model:
        assert routers_of(model).keys() == {0} and torch.equal(routers_of(model)[0].offset, learned[0].offset)
    assert "no backward pass" not in caplog.text
    with surgery.operated(tiny_llama, SMALL, **given) as model:
        assert all(router.offset is None for router in routers_of(model).values())
    assert "no backward pass" in caplog.text


def test_a_model_that_cannot_be_made_sparse_is_left_dense(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_budget, "WINDOWS", 1)
    model, tokenizer = demo
    with pytest.raises(SurgeryError, match="cannot be made sparse"):
        surgery.operate(model, SMALL, max_loss=1e-6, text=texts, tokenizer=tokenizer, length=256)
    assert not surgery.is_operated(model)


def test_tiles_of_one_row_have_one_threshold(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=1)
    given = {"text": texts, "tokenizer": tokenizer, "length": 256}
    with surgery.operated(tiny_llama, config, max_loss=0.5, **given) as model:
        found = surgery.config_of(model)
        assert found.theta == found.theta_decode


def test_what_does_not_go_together_is_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    given = {"text": texts, "tokenizer": tokenizer, "length": 256}
    for options, told in (
        ({"max_loss": 0.01, "density": 0.1, **given}, "and a density: one of them sets the threshold"),
        ({"max_loss": 0.01, "decode_density": 0.1, **given}, "and a density"),
        ({"max_loss": 0.01}, "go together"),
        ({"max_loss": 1, **given}, "0.01 is one per cent"),
        ({"max_loss": 0.01, **given, "tokenizer": None}, "needs the model's tokenizer"),
    ):
        with pytest.raises(SurgeryError, match=told):
            surgery.operate(tiny_llama, SMALL, **options)
        assert not surgery.is_operated(tiny_llama)
    gumbel = SurgeryConfig(topology="gumbel")
    with pytest.raises(SurgeryError, match="no threshold that a density or a loss could set"):
        surgery.operate(tiny_llama, gumbel, max_loss=0.01, **given)

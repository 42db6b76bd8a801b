"""Comparisons: budgets, cells, resuming, rows."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_surgery import SurgeryConfig, is_operated
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation import compare
from llama_surgery.evaluation.compare import FORMS, Comparison
from llama_surgery.evaluation.compare_forms import densities_between, solve
from llama_surgery.evaluation.kept import Kept
from llama_surgery.evaluation.peers import registry as seer
from llama_surgery.surgery import operate
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16)
#: An adapter of the tiny model: another window, and heads that trade what they may read.
ADAPTED = dataclasses.replace(CONFIG, window=64)
OFFSETS = {0: PageRouter(offset=torch.tensor([[0.3, -0.3], [0.1, -0.1]]))}


@pytest.fixture
def comparison(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path
):
    for layer in tiny_llama.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(0.2)  # attention spread out: every density can be reached

    def make(**changed) -> Comparison:
        arguments = {
            "texts": texts[:1],
            "calibration": texts[1:],
            "config": CONFIG,
            "length": 256,
            "windows": 2,
            "needles": 2,
            "needle_lengths": [256],
            "needle_variants": ["one-fact"],
            "densities": [0.6],
        }
        return Comparison(tiny_llama, tokenizer, Kept(tmp_path), **(arguments | changed))

    return make


@pytest.fixture
def cells(tmp_path: Path):
    """Finished cells, by file."""
    return lambda: {file: file.read_bytes() for file in (tmp_path / "kept").glob("cell-*.json")}


def test_a_density_is_solved_for() -> None:
    asked = []

    def density(x: float) -> float:
        asked.append(x)
        return 0.02 * 50 ** (x**2)

    for target in (0.05, 0.18, 0.5):
        assert density(solve(density, target)) == pytest.approx(target, rel=0.03)
    assert solve(density, 0.02) == 0 and len(asked) < 30
    # A knob in coarse steps: the nearest there is.
    assert math.floor(solve(lambda x: 0.1 + 0.3 * math.floor(3 * x), 0.45) * 3) == 1


def test_at_least_five_densities_from_the_floor_on() -> None:
    assert densities_between(0.02, (0.5, 0.1, 0.05, 0.3, 0.18)) == [0.02, 0.05, 0.1, 0.18, 0.3, 0.5]
    few = densities_between(0.2, (0.05, 0.3, 0.5))
    assert few[0] == 0.2 and few[-1] == 0.5 and 0.3 in few and len(few) == 5 and few == sorted(few)
    assert len(densities_between(0.7, (0.5,))) == 5


def test_every_form_is_measured(comparison, monkeypatch) -> None:
    monkeypatch.setattr(seer, "STEPS", 5)
    monkeypatch.setattr(compare, "densities_between", lambda floor, requested: [0.6])
    # Retrieval heads stream over more keys than these windows have.
    forms = [name for name in FORMS if name != "duo"]
    results = comparison(adapter=(ADAPTED, OFFSETS), rules=forms).run()
    assert results["unfinished"] == []
    rows = {(row["form"], row["target_density"]): row for row in results["rows"]}
    assert {form for form, _ in rows} == set(forms)
    for form, target in rows:
        row = rows[form, target]
        assert row["model"] == "LlamaForCausalLM" and row["seed"] == 0 and row["needles"] == 2
        assert row["ratio_low"] <= row["perplexity_ratio"] <= row["ratio_high"]
        assert 0 <= row["needle_low"] <= row["needle"] <= row["needle_high"] <= 1
        assert row["needle_one-fact"] == row["needle"]
        assert row["floor"] <= row["total_density"] * 1.05
        if target < 1 and form not in ("minference", "xattention", "flexprefill"):
            assert row["total_density"] == pytest.approx(max(0.6, row["floor"]), abs=0.1)
    assert rows["learned", 0.6]["title"] == "pages, tile 16, learned (this package)"
    for form in ("dense", "full", "pages", "learned"):
        row = rows[form, 1.0]
        assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-6) and row["needle_changed"] == 0
        assert row["total_density"] == row["prefill_density"] == row["decode_density"] == 1
    # Two blocks of 128, the first and the own one, are all of these windows.
    assert results["floors"].keys() == set(forms) - {"dense", "full", "xattention", "flexprefill"}
    assert [row["form"] for row in results["rows"][:2]] == ["dense", "pages"]


def test_an_adapter_is_a_form_of_its_own(comparison, cells, monkeypatch) -> None:
    monkeypatch.setattr(compare, "densities_between", lambda floor, requested: [0.6])
    routers = []
    layers = operate._layers
    monkeypatch.setattr(operate, "_layers", lambda *given: (routers.append(given[3]), layers(*given))[1])
    with pytest.raises(SurgeryError, match="'learned' needs an adapter"):
        comparison(rules=["learned"])
    # The folder of a comparison without an adapter takes one up, and goes on without it.
    comparison(rules=["dense"]).run()
    (dense,) = cells()
    found = comparison(adapter=(ADAPTED, OFFSETS), rules=["learned"]).run()
    assert {row["form"] for row in found["rows"]} == {"dense", "learned"}
    assert routers and all(given == OFFSETS for given in routers)
    assert dense in cells() and len(cells()) == 3
    assert found["rows"][1]["number"] != ADAPTED.theta
    # The same adapter, read from files again; then another configuration, and other corrections.
    again, times = {0: PageRouter(offset=OFFSETS[0].offset.clone())}, len(routers)
    assert comparison(adapter=(ADAPTED, again), rules=["learned"]).run() == found
    assert len(routers) == times
    for other in ((CONFIG, OFFSETS), (ADAPTED, {0: PageRouter(offset=torch.zeros(2, 2))})):
        comparison(adapter=other, rules=["learned"]).run()
        assert len(routers) > times
        times = len(routers)


def test_an_interrupted_run_goes_on(comparison, cells, tiny_llama, monkeypatch) -> None:
    given = {"rules": ["streaming"]}
    with pytest.raises(SurgeryError, match="dense model is not measured"):
        comparison(**given).run(deadline=0.0)
    # The third cell fails, as a process that dies.
    score, count = compare.score_needles, iter(range(100))

    def dies(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(compare, "score_needles", dies)
    with pytest.raises(KeyboardInterrupt):
        comparison(**given).run()
    assert not is_operated(tiny_llama)
    finished = cells()
    assert len(finished) == 2
    late = comparison(**given).run(deadline=0.0)
    assert late["unfinished"] == ["streaming"] and len(late["rows"]) == 2
    whole = comparison(**given).run()
    assert finished.items() <= cells().items() and len(cells()) == len(whole["rows"]) >= 6
    stops = next(count)
    assert comparison(**given).run() == whole and next(count) == stops + 1  # nothing is measured again


def test_a_cell_without_memory_is_named(comparison, cells, monkeypatch) -> None:
    def fails(*arguments):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(compare, "score_needles", fails)
        with pytest.raises(SurgeryError, match="out of memory with dense at 1"):
            comparison(rules=["dense"]).run()
    assert not cells()
    assert comparison(rules=["dense"]).run()["unfinished"] == []


def test_what_cannot_be_compared_is_refused(comparison) -> None:
    with pytest.raises(SurgeryError, match="between 0 and 1"):
        comparison(densities=[1.5])
    with pytest.raises(SurgeryError, match="rules nonsense: there are dense, pages"):
        comparison(rules=["nonsense"])


def test_short_calibration_text_is_used_as_far_as_it_goes(tokenizer, texts) -> None:
    found = compare._calibration_windows(tokenizer, [texts[0]], 2048, 0)
    assert found.shape == (4, 2048)
    with pytest.raises(TextError, match="2 windows of 8192 tokens were asked for"):
        compare._calibration_windows(tokenizer, [texts[0]], 8192, 0)

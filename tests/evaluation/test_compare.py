"""Comparisons: budgets, cells, resuming, merging, the gate."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_surgery import SurgeryConfig, is_operated
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation import compare, compare_budgets, compare_samples
from llama_surgery.evaluation.compare import FORMS, Comparison, unfinished
from llama_surgery.evaluation.compare_budgets import claimed
from llama_surgery.evaluation.compare_forms import densities_between, solve
from llama_surgery.evaluation.compare_result import merge
from llama_surgery.evaluation.gate import read_losses
from llama_surgery.evaluation.peers import gate as seer
from llama_surgery.evaluation.summary_density import summary_density
from llama_surgery.surgery import operate
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16)
#: An adapter of the tiny model: summaries, and heads that trade what they may read.
SUMMARISED = dataclasses.replace(CONFIG, summary="ball", window=64)
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
        return Comparison(tiny_llama, tokenizer, tmp_path, **(arguments | changed))

    return make


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


def test_every_form_is_measured_and_merged(comparison, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(seer, "STEPS", 5)
    monkeypatch.setattr(compare_budgets, "densities_between", lambda floor, requested: [0.6])
    # Retrieval heads stream over more keys than these windows have.
    forms = [name for name in FORMS if name != "duo"]
    assert comparison(adapter=(SUMMARISED, OFFSETS)).run(forms)
    results = merge(tmp_path)
    rows = {(row["form"], row["target_density"]): row for row in results["rows"]}
    assert {form for form, _ in rows} == set(forms)
    for form, target in rows:
        row = rows[form, target]
        assert row["model"] == "LlamaForCausalLM" and row["seed"] == 0 and row["needles"] == 2
        assert row["ratio_low"] <= row["perplexity_ratio"] <= row["ratio_high"]
        assert 0 <= row["needle_low"] <= row["needle"] <= row["needle_high"] <= 1
        assert row["floor"] <= row["total_density"] * 1.05
        if target < 1 and form not in ("minference", "xattention", "flexprefill"):
            assert row["total_density"] == pytest.approx(0.6, abs=0.1)
        summarised = form == "learned" and target < 1
        expected = summary_density(SUMMARISED, 256) if summarised else 0
        assert row["summary_density"] == row["prefill_summary_density"] == expected
        assert (row["decode_summary_density"] > 0) == summarised
    assert rows["learned", 0.6]["title"] == "pages, tile 16, learned (this package)"
    for form in ("dense", "full", "pages", "learned"):
        row = rows[form, 1.0]
        assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-6) and row["needle_changed"] == 0
        assert row["total_density"] == row["prefill_density"] == row["decode_density"] == 1
    # Two blocks of 128, the first and the own one, are all of these windows.
    assert results["floors"].keys() == set(forms) - {"dense", "full", "xattention", "flexprefill"}
    assert [row["form"] for row in results["rows"][:2]] == ["dense", "pages"]


def test_an_adapter_is_a_form_of_its_own(comparison, tiny_llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare_budgets, "densities_between", lambda floor, requested: [0.6])
    routers = []
    layers = operate._layers
    monkeypatch.setattr(operate, "_layers", lambda *given: (routers.append(given[3]), layers(*given))[1])
    compared = comparison()
    with pytest.raises(SurgeryError, match="'learned' needs an adapter"):
        compared.run(["learned"])
    before = (tmp_path / "comparison.json").read_bytes()
    # The folder of a comparison without an adapter takes one up, and goes on without it.
    assert comparison(adapter=(SUMMARISED, OFFSETS)).run(["dense", "learned"])
    assert (tmp_path / "comparison.json").read_bytes() == before
    assert routers and all(given == OFFSETS for given in routers)
    cell = json.loads((tmp_path / "cells" / "learned-0.6000-perplexity.json").read_text(encoding="utf-8"))
    assert cell["setting"]["summary"] == "ball" and cell["setting"]["window"] == 64
    assert cell["setting"]["theta"] != SUMMARISED.theta
    assert comparison().run(["dense"])
    assert {row["form"] for row in merge(tmp_path)["rows"]} == {"dense", "learned"}
    # The same adapter, read from files again; then another configuration, and other corrections.
    again = {0: PageRouter(offset=OFFSETS[0].offset.clone())}
    assert comparison(adapter=(SUMMARISED, again)).run(["learned"])
    for other in ((CONFIG, OFFSETS), (SUMMARISED, {0: PageRouter(offset=torch.zeros(2, 2))})):
        with pytest.raises(SurgeryError, match="compared another adapter"):
            comparison(adapter=other)


def test_an_interrupted_run_goes_on(comparison, tiny_llama, tmp_path: Path, monkeypatch) -> None:
    forms = ["dense", "streaming"]
    assert not comparison().run(forms, deadline=0.0)
    with pytest.raises(SurgeryError, match="dense model is not measured"):
        merge(tmp_path)
    # The second cell fails, as a process that dies.
    measure, count = Comparison._measure, iter(range(100))

    def dies(self, *arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(Comparison, "_measure", dies)
    with pytest.raises(KeyboardInterrupt):
        comparison().run(forms)
    assert not is_operated(tiny_llama)
    finished = {file: file.read_bytes() for file in (tmp_path / "cells").iterdir()}
    assert len(finished) == 3
    budget = (tmp_path / "budgets" / "streaming.json").read_text(encoding="utf-8")
    assert comparison().run(forms)
    assert {file: file.read_bytes() for file in finished} == finished
    again = json.loads((tmp_path / "budgets" / "streaming.json").read_text(encoding="utf-8"))
    assert again["targets"] == json.loads(budget)["targets"]
    assert len(list((tmp_path / "cells").iterdir())) == 2 + 2 * len(again["targets"])
    stops = next(count)
    assert comparison().run(forms) and next(count) == stops + 1  # nothing is measured again


def test_a_cell_without_memory_is_left_for_the_next_run(comparison, tmp_path: Path, monkeypatch) -> None:
    def fails(self, progress):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_answer", fails)
        compared = comparison()
        assert not compared.run(["dense", "full"])
        assert compared.no_memory == ["dense at 1, needles", "full at 1, needles"]
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert compared.run(["dense", "full"]) and compared.no_memory == []


def test_other_settings_need_another_folder(comparison) -> None:
    comparison()
    with pytest.raises(SurgeryError, match="seed: 0 there, 1 now"):
        comparison(seed=1)
    with pytest.raises(SurgeryError, match="between 0 and 1"):
        comparison(densities=[1.5])
    with pytest.raises(SurgeryError, match="forms nonsense: there are dense, pages"):
        comparison().run(["nonsense"])


def test_longer_prompts_are_answered_in_smaller_batches(comparison, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def score(model, prompts, batch, progress):
        asked.append(({prompt.length for prompt in prompts}, batch))
        return [prompt.length == 512 for prompt in prompts]

    monkeypatch.setattr(compare, "score_needles", score)
    compared = comparison(needles=6, needle_lengths=[256, 512, 512], needle_batch=4)
    right = compared._answer(None)
    assert asked == [({256}, 4), ({512}, 2)]
    assert right == [prompt.length == 512 for prompt in compared._prompts]


def test_samples_are_made_once(comparison, tmp_path: Path, monkeypatch) -> None:
    first = comparison()
    (file,) = tmp_path.glob("samples-*.json")
    monkeypatch.setattr(compare_samples, "needle_prompts", None)
    monkeypatch.setattr(compare_samples, "cut_windows", None)
    again = comparison()
    assert again._prompts == first._prompts and torch.equal(again._ids, first._ids)
    with pytest.raises(TypeError):  # other samples have to be made
        comparison(windows=1)
    assert list(tmp_path.glob("samples-*.json")) == [file]


def test_short_calibration_text_is_used_as_far_as_it_goes(tokenizer, texts) -> None:
    found = compare_samples._calibration_windows(tokenizer, [texts[0]], 2048, 0)
    assert found.shape == (4, 2048)
    with pytest.raises(TextError, match="2 windows of 8192 tokens were asked for"):
        compare_samples._calibration_windows(tokenizer, [texts[0]], 8192, 0)


def test_what_another_process_is_at_is_left_to_it(comparison, tmp_path: Path) -> None:
    compared = comparison()
    with claimed(tmp_path, "dense-1.0000", wait=True):
        assert not compared.run(["dense", "full"], first=["full"])
    assert {file.stem for file in (tmp_path / "cells").iterdir()} == {
        "full-1.0000-perplexity",
        "full-1.0000-needles",
    }
    assert unfinished(tmp_path, ["dense", "full", "quest"]) == ["dense", "quest"]
    assert compared.run(["dense", "full"]) and unfinished(tmp_path, ["dense", "full"]) == []


def test_a_folder_without_locks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("in the way", encoding="utf-8")
    with pytest.raises(SurgeryError, match="could not lock"), claimed(tmp_path, "dense-1.0000", wait=True):
        pass


def results_file(path: Path, **row) -> Path:
    rows = [
        {"form": "pages", "target_density": 0.18, "ratio_high": 1.01, "needle_bound": -0.03} | row,
        {"form": "moba", "target_density": 0.18, "ratio_high": 1.09, "needle_bound": -0.3},
    ]
    path.write_text(json.dumps({"format": "llama-surgery comparison", "rows": rows}), encoding="utf-8")
    return path


def test_limits_are_held_against_bounds(tmp_path: Path) -> None:
    path = results_file(tmp_path / "r.json")
    (loss,) = read_losses(path, "pages", 0.18)
    assert loss.failures(1.01, 0.03) == []
    assert loss.failures(1.005, None) == [
        "pages at 0.18: perplexity over dense may be 1.0100, and its limit is 1.005."
    ]
    assert [told.split(":")[0] for told in loss.failures(1.0, 0.0)] == ["pages at 0.18"] * 2
    assert len(read_losses(path)) == 2
    assert len(read_losses(results_file(tmp_path / "r.json", target_density=1.0))) == 1
    (unmeasured,) = read_losses(results_file(tmp_path / "r.json", needle_bound=None), "pages")
    assert "was not measured" in unmeasured.failures(None, 0.05)[0]
    (broken,) = read_losses(results_file(tmp_path / "r.json", ratio_high=math.nan), "pages")
    assert broken.failures(1.01, None)


def test_the_gate_names_what_there_is(tmp_path: Path) -> None:
    path = results_file(tmp_path / "r.json")
    with pytest.raises(SurgeryError, match="no quest; there is pages, moba"):
        read_losses(path, "quest")
    with pytest.raises(SurgeryError, match=r"at a density of 0\.3; there is nothing"):
        read_losses(path, density=0.3)
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_losses(tmp_path / "nowhere.json")

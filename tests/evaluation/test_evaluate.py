import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import llama_surgery
from llama_surgery import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.evaluate import evaluate, model_name
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.files import write_csv
from llama_surgery.text import windows

TILED = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=1e4, theta_decode=1e4)
CONFIGS = {
    "T = 16": TILED,
    "T = 1": dataclasses.replace(TILED, tile=1, theta=1e4),
    "everything open": dataclasses.replace(TILED, theta=0.0, theta_decode=0.0),
}
SETTINGS = {"length": 1024, "windows": 3, "needles": 6, "seed": 5}


@pytest.fixture(scope="module")
def measured(make_llama, tokenizer, texts):
    """One evaluation for all tests that look at what it found: result, progress, and the model after it."""
    steps, tiny_llama = [], make_llama()
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    result = evaluate(
        tiny_llama,
        tokenizer,
        eval_texts=texts,
        configs=CONFIGS,
        **SETTINGS,
        progress=lambda *step: steps.append(step),
    )
    assert not llama_surgery.is_operated(tiny_llama)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.state_dict().items())
    return result, steps, tiny_llama


def test_result_says_what_was_measured_and_how(measured, tiny_llama, tokenizer, texts) -> None:
    result, steps, _ = measured
    ids = windows(tokenizer, texts, 1024, 3, seed=5)
    assert result.dense.perplexity == perplexity(tiny_llama, ids).value
    assert [m.name for m in result.operated] == list(CONFIGS)
    assert result.model == "LlamaForCausalLM"
    assert result.environment["torch"] == torch.__version__
    assert result.environment["dtype"] == "float32"
    assert steps[2] == ("dense: perplexity", 3, 3)
    assert steps[-1] == ("everything open: needles", 6, 6)
    for operated in result.operated:
        assert SurgeryConfig.from_dict(operated.config) == CONFIGS[operated.name]
        parts = ("near_density", "far_density", "summary_density")
        total = sum(operated.density[name] for name in parts)
        assert operated.density["total_density"] == pytest.approx(total)
        assert operated.ratio.count == 3
        assert operated.ratio.ratio == pytest.approx(operated.perplexity / result.dense.perplexity)
        assert operated.needle.count == 6


def test_everything_open_is_dense(measured) -> None:
    result, _, _ = measured
    operated = result.operated[-1]
    assert operated.density["total_density"] == pytest.approx(1.0)
    assert operated.ratio.ratio == pytest.approx(1.0, abs=1e-5)
    assert operated.kl == pytest.approx(0.0, abs=1e-5)
    assert operated.top1 == 1.0
    assert result.answers["everything open"] == result.answers["dense"]


def test_sparse_forms_differ_and_read_less(measured) -> None:
    result, _, _ = measured
    for operated in result.operated[:2]:
        assert operated.density["total_density"] < 0.9
        assert operated.kl > 1e-4
        assert operated.top1 < 1.0


def test_prefill_and_decode_are_told_apart(measured) -> None:
    result, _, tiny_llama = measured
    for operated in result.operated:
        phases = operated.generate_density
        assert set(phases) == {"prefill", "decode"}
        for densities in phases.values():
            total = sum(densities[name] for name in ("near_density", "far_density", "summary_density"))
            assert densities["total_density"] == pytest.approx(total)
    # One decoded row near position 1024 has at most this much of its context in the near field.
    sparse = result.operated[0].generate_density["decode"]
    assert sparse["near_density"] <= (32 + 64 + 16) / 1000
    # The statistics go on counting after the hooks are gone, but nothing is left on the model.
    assert not tiny_llama.model._forward_hooks
    assert not tiny_llama.model._forward_pre_hooks


def test_rows_and_plain_values(measured, tmp_path: Path) -> None:
    result, _, _ = measured
    read = json.loads(json.dumps(result.to_dict()))
    assert read["dense"]["perplexity"] == result.dense.perplexity
    assert read["operated"][0]["density"]["far_density"] == result.operated[0].density["far_density"]
    assert read["needles"][0]["right"].keys() == {"dense", *CONFIGS}

    write_csv(tmp_path / "result.csv", result.rows())
    with (tmp_path / "result.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["dense", *CONFIGS]
    assert rows[0]["far_density"] == ""
    for row in rows:
        needed = ("model", "length", "windows", "needles", "seed", "torch", "device", "total_density")
        assert all(row[column] for column in needed)
    assert float(rows[1]["decode_far_density"]) == pytest.approx(
        result.operated[0].generate_density["decode"]["far_density"]
    )


def test_divergence_by_position_has_the_bins_of_perplexity(measured) -> None:
    result, _, _ = measured
    bins = result.operated[0].divergence_by_position
    assert [(b["from"], b["to"]) for b in bins] == [(1, 256), (256, 512), (512, 1024)]
    assert [(b["from"], b["to"]) for b in result.operated[0].by_position] == [
        (b["from"], b["to"]) for b in bins
    ]
    # Nothing is left out below position 96, and something is behind.
    assert bins[0]["kl"] < bins[2]["kl"] and bins[2]["top1"] < 1


def test_csv_has_the_union_of_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"a": 1}, {"b": "x, y", "a": None}])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == 'a,b\n1,\n,"x, y"\n'
    with pytest.raises(SurgeryError, match="could not write"):
        write_csv(tmp_path, [])


def test_without_needles(tiny_llama, tokenizer, texts) -> None:
    settings = {**SETTINGS, "needles": 0}
    result = evaluate(tiny_llama, tokenizer, eval_texts=texts, configs={"T = 16": TILED}, **settings)
    assert result.needles == []
    assert result.dense.needle_accuracy is None
    assert result.operated[0].needle is None
    assert result.operated[0].generate_density == {}
    assert len(result.rows()) == 2


def test_failure_while_operated_ejects(tiny_llama, tokenizer, texts) -> None:
    def fail(stage: str, done: int, total: int) -> None:
        if stage == "T = 16: needles":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tokenizer, eval_texts=texts, configs=CONFIGS, **SETTINGS, progress=fail)
    assert not llama_surgery.is_operated(tiny_llama)
    assert not tiny_llama.model._forward_hooks


def test_wrong_state_of_the_model_is_refused(tiny_llama, tokenizer, texts) -> None:
    def run(**changes):
        settings = {**SETTINGS, "eval_texts": texts, "configs": {"T = 16": TILED}, **changes}
        evaluate(tiny_llama, tokenizer, **settings)

    with pytest.raises(SurgeryError, match="named 'dense'"):
        run(configs={"dense": TILED})
    with pytest.raises(TextError, match="whole ones"):
        run(windows=1000)
    with llama_surgery.operated(tiny_llama, TILED), pytest.raises(SurgeryError, match="eject"):
        run()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_llama.config, "vocab_size", 32)
        with pytest.raises(SurgeryError, match=r"the model knows 32 \(vocab_size\)"):
            run()
    tiny_llama.train()
    with pytest.raises(SurgeryError, match=r"model\.eval\(\)"):
        run()


def test_name_of_a_model_is_never_a_path(tiny_llama, tmp_path: Path) -> None:
    tiny_llama.config._name_or_path = "someone/some-model"
    assert model_name(tiny_llama) == "someone/some-model"
    folder = tmp_path / "a-model"
    folder.mkdir()
    tiny_llama.config._name_or_path = str(folder)
    assert model_name(tiny_llama) == "a-model"

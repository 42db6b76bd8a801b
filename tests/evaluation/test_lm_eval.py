"""The bridge to lm-evaluation-harness, on two local tasks of a few hundred tokens a question."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import ROOT

import llama_surgery
from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.evaluation.lm_eval import _row, compare_on_tasks
from llama_surgery.text import encode

SPARSE = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.3, theta_decode=0.3)
OPEN = dataclasses.replace(SPARSE, theta=0.0, theta_decode=0.0)
TASKS = ["surgery_choose", "surgery_write"]
SAMPLES = 12


@pytest.fixture(scope="module")
def documents(texts: list[str]) -> list[dict]:
    rng, words = random.Random(0), texts[0].split()
    made = []
    for _ in range(SAMPLES):
        start, size = rng.randrange(2000), rng.randrange(120, 200)
        choices = rng.sample(["garden", "winter", "the", "upon it", "seven"], 3)
        made.append(
            {"context": " ".join(words[start : start + size]), "choices": choices, "answer": rng.randrange(3)}
        )
    return made


@pytest.fixture(scope="module")
def tasks(documents: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks, their data and a cache of its own."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    paths = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name in ("choose", "write"):
        task = (ROOT / "tests" / "fixtures" / "lm-eval" / f"{name}.yaml").read_text(encoding="utf-8")
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(f"{task}dataset_kwargs: {json.dumps(paths)}\n", encoding="utf-8")
    return folder


def accuracy(model, tokenizer, documents: list[dict]) -> float:
    """Share of documents whose right choice has the highest log-likelihood."""
    right = 0
    for document in documents:
        scores = []
        for choice in document["choices"]:
            whole = encode(tokenizer, f"{document['context']} {choice}")
            size = len(whole) - len(encode(tokenizer, document["context"]))
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0, -size:].log_softmax(-1)
            scores.append(logits.gather(1, torch.tensor(whole[-size:])[:, None]).sum().item())
        right += scores.index(max(scores)) == document["answer"]
    return right / len(documents)


def test_the_harness_measures_what_the_operated_model_does(tiny_llama, tokenizer, tasks, documents) -> None:
    found = compare_on_tasks(tiny_llama, tokenizer, TASKS, config=SPARSE, include=tasks, batch_size=4, seed=1)
    assert not llama_surgery.is_operated(tiny_llama)
    chosen, written = found["rows"]
    assert (chosen["task"], chosen["metric"], chosen["samples"]) == ("surgery_choose", "acc", SAMPLES)
    assert chosen["dense"] == pytest.approx(accuracy(tiny_llama, tokenizer, documents))
    with llama_surgery.operated(tiny_llama, SPARSE):
        assert chosen["operated"] == pytest.approx(accuracy(tiny_llama, tokenizer, documents))
    # Otherwise the test would not see whether the topology was there.
    assert chosen["lost"] + chosen["won"] > 0
    assert chosen["difference"] == pytest.approx((chosen["won"] - chosen["lost"]) / SAMPLES)
    assert chosen["low"] < chosen["difference"] < chosen["high"]
    assert (written["task"], written["metric"]) == ("surgery_write", "exact_match")
    assert 0 < found["density"]["total_density"] < 0.9
    assert set(found["density"]["by_tile"]) == {"1", "8"}
    assert found["config"] == SPARSE.to_dict() and found["environment"]["lm_eval"]
    json.dumps(found)


def test_everything_open_answers_as_dense_to_the_last_sample(tiny_llama, tokenizer, tasks) -> None:
    found = compare_on_tasks(tiny_llama, tokenizer, TASKS, config=OPEN, include=tasks, limit=6)
    assert found["density"]["total_density"] == pytest.approx(1.0)
    for row in found["rows"]:
        assert row["samples"] == 6
        assert row["operated"] == row["dense"] and (row["lost"], row["won"]) == (0, 0)


def test_unknown_tasks_and_absent_data_are_refused(
    tiny_llama, tokenizer, tasks: Path, tmp_path: Path
) -> None:
    for names in ([], ["surgery_choose", "no_such_task"]):
        with pytest.raises(SurgeryError, match=r"no such tasks: (none was given|no_such_task)\."):
            compare_on_tasks(tiny_llama, tokenizer, names, config=SPARSE, include=tasks)
    own = tmp_path / "own.yaml"
    paths = json.dumps({"data_files": {"test": str(tmp_path / "nowhere.jsonl")}})
    own.write_text(
        (tasks / "choose.yaml").read_text(encoding="utf-8").partition("dataset_kwargs")[0]
        + f"dataset_kwargs: {paths}\n",
        encoding="utf-8",
    )
    with pytest.raises(SurgeryError, match="could not be loaded"):
        compare_on_tasks(tiny_llama, tokenizer, [str(own)], config=SPARSE)


def test_without_the_harness_the_error_says_how_to_get_it(
    tiny_llama, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SurgeryError, match=r"llama-surgery\[lm-eval\]"):
        compare_on_tasks(tiny_llama, tokenizer, ["any"], config=SPARSE)


def test_only_means_of_samples_have_a_paired_interval() -> None:
    def results(total: float, values: list[float]) -> dict:
        samples = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
        return {
            "results": {"a": {"acc,none": total, "acc_stderr,none": "N/A"}},
            "samples": {"a": samples[::-1]},
            "n-samples": {"a": {"effective": 3}},
        }

    row = _row("a", "acc,none", results(2 / 3, [1.0, 0.0, 1.0]), results(1 / 3, [0.0, 1.0, 0.0]))
    assert (row["lost"], row["won"], row["samples"]) == (2, 1, 3) and row["dense_stderr"] is None
    for total, values in ((0.9, [1.0, 0.0, 1.0]), (3.0, [4.0, 2.0, 3.0]), (0.5, [])):
        row = _row("a", "acc,none", results(total, values), results(total, values))
        assert row["low"] is None and row["lost"] is None and row["difference"] == 0

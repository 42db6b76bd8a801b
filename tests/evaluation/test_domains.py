from pathlib import Path

import pytest

from llama_surgery import SurgeryConfig
from llama_surgery.errors import TextError
from llama_surgery.evaluation.domains import evaluate_domains, read_domains
from llama_surgery.evaluation.evaluate import evaluate

CONFIGS = {"T = 16": SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.1)}


def test_each_domain_is_evaluated_as_it_would_be_alone(tiny_llama, tokenizer, texts) -> None:
    steps = []
    found = evaluate_domains(
        tiny_llama,
        tokenizer,
        domains={"first": texts[:1], "rest": texts[1:]},
        length=600,
        windows=2,
        configs=CONFIGS,
        progress=lambda *step: steps.append(step),
    )
    assert list(found) == ["first", "rest"]
    assert steps[0] == ("first: dense: perplexity", 1, 2)
    alone = evaluate(
        tiny_llama, tokenizer, eval_texts=texts[1:], length=600, windows=2, needles=0, configs=CONFIGS
    )
    assert found["rest"].dense.perplexity == alone.dense.perplexity
    assert found["rest"].operated[0].kl == alone.operated[0].kl
    assert found["first"].dense.perplexity != found["rest"].dense.perplexity


def test_divergence_by_position_has_the_bins_of_perplexity(tiny_llama, tokenizer, texts) -> None:
    (operated,) = evaluate(
        tiny_llama, tokenizer, eval_texts=texts, length=600, windows=2, needles=0, configs=CONFIGS
    ).operated
    bins = operated.divergence_by_position
    assert [(b["from"], b["to"]) for b in bins] == [(1, 256), (256, 512), (512, 600)]
    assert [(b["from"], b["to"]) for b in operated.by_position] == [(b["from"], b["to"]) for b in bins]
    # Nothing is left out below position 96, and something is behind.
    assert bins[0]["kl"] < bins[2]["kl"] and bins[2]["top1"] < 1


def test_a_text_that_is_too_short_names_its_domain(tiny_llama, tokenizer) -> None:
    with pytest.raises(TextError, match=r"domain 'small': .*windows"):
        evaluate_domains(
            tiny_llama, tokenizer, domains={"small": ["few words"]}, length=64, windows=1, configs=CONFIGS
        )


def test_domains_are_named_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "french").mkdir()
    (tmp_path / "french" / "a.txt").write_text("un", encoding="utf-8")
    (tmp_path / "odd=name.txt").write_text("two", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_domains(["french", "odd=name.txt", "again=french"]) == {
        "french": ["un"],
        "odd=name": ["two"],
        "again": ["un"],
    }
    with pytest.raises(TextError, match="two domains are named 'french'"):
        read_domains(["french", f"french={tmp_path / 'french'}"])
    with pytest.raises(TextError, match="no such file"):
        read_domains(["code=nowhere"])

"""``--topology gumbel`` on the command line: operate, learn, evaluate, generate."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import run
from transformers import AutoModelForCausalLM

from llama_surgery import config_of, load_adapter
from llama_surgery.surgery.operation import routers_of

GUMBEL = ["--topology", "gumbel", "--gumbel-radius", "1", "--gumbel-window", "16", "--gumbel-length", "256"]


def test_learned_evaluated_and_generated_with(model: Path, text: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    command = ["learn", model, "--text", text, "--out", adapter, *GUMBEL, "--gumbel-arities", "3"]
    command += ["--length", "128", "--windows", "3", "--steps", "3", "--rate", "2.0", "--json"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["last_step"]["step"] == 3 and 0 < told["last_step"]["density"] < 1
    assert told["config"]["gumbel"] == {"arities": [3], "radius": 1, "window": 16, "length": 256}

    again = run(*command)  # nothing is left to do: the checkpoint is that of the end
    assert again.exit_code == 0 and json.loads(again.stdout)["last_step"] is None
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(model), adapter)
    assert config_of(loaded).to_dict() == told["config"] and routers_of(loaded)[0].shapes == [(6, 3)]

    given = ["--adapter", adapter, "--length", "128", "--windows", "1", "--json"]
    evaluated = run("evaluate", model, "--text", text, *given, "--needles", "1")
    assert evaluated.exit_code == 0, evaluated.output
    (operated,) = json.loads(evaluated.stdout)["operated"]
    assert operated["config"] == told["config"] and 0 < operated["density"]["visible_far_density"] < 1
    assert set(operated["generate_density"]) == {"prefill", "decode"}

    generated = run("generate", model, "--adapter", adapter, "--prompt", "the", "--max-new-tokens", "4")
    assert generated.exit_code == 0, generated.output


def test_untrained_routers_are_dense(model: Path, text: Path, tmp_path: Path) -> None:
    result = run("operate", model, "--out", tmp_path / "adapter", *GUMBEL)
    assert result.exit_code == 0, result.output
    given = ["--length", "128", "--windows", "1", "--json", "--gumbel-arities", "2", "--gumbel-arities", "4"]
    evaluated = run("evaluate", model, "--text", text, *GUMBEL, *given)
    assert evaluated.exit_code == 0, evaluated.output
    (operated,) = json.loads(evaluated.stdout)["operated"]
    assert operated["config"]["gumbel"]["arities"] == [2, 4]
    assert operated["perplexity"] == pytest.approx(json.loads(evaluated.stdout)["dense"]["perplexity"])
    assert operated["density"]["near_density"] + operated["density"]["visible_far_density"] == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["learn", *GUMBEL, "--density", "0.1"], "leave --density"),
        (["learn", *GUMBEL, "--stream"], "leave --density"),
        (["learn", "--topology", "ring"], "allowed are pages, gumbel"),
        (["operate", *GUMBEL, "--density", "0.1"], "no threshold that a density or a loss could set"),
        (["operate", "--gumbel-radius", "3"], "not of 'pages'"),
    ],
)
def test_what_does_not_go_together(
    command: list[str], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    given = ["--text", text] if "--density" in command or command[0] == "learn" else []
    result = run(command[0], model, "--out", tmp_path / "adapter", *given, *command[1:])
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output


def test_pages_need_a_density(model: Path, text: Path, tmp_path: Path) -> None:
    result = run("learn", model, "--out", tmp_path / "adapter", "--text", text)
    assert result.exit_code == 2 and "--density" in result.output

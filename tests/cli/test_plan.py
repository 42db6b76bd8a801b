"""``llama-surgery plan``: counts that can be checked by hand."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import run

from llama_surgery import SurgeryConfig
from llama_surgery.learning.forecast import Shape, at_length
from llama_surgery.topology.geometry import closed_chunks

SHAPE = Shape(1_000_000, 100_000, 64, 256, {0: (2, 2, 16), 3: (2, 2, 16)}, 2)


def test_densities_are_those_of_a_loop() -> None:
    config = SurgeryConfig(summary="page")
    length = 1500
    text = at_length(SHAPE, config, 0.05, length)
    seen = [closed_chunks(p, config, config.tile) * config.chunk_size for p in range(length)]
    causal = length * (length + 1) / 2
    closed = sum(seen) / causal
    assert text.near_density == pytest.approx(1 - closed)
    assert text.far_density == pytest.approx(min(closed, 0.05))
    # Pages once, and the near fields of rows with pages once more.
    near = sum(p + 1 - keys for p, keys in enumerate(seen) if keys) / causal
    assert text.scoring == pytest.approx(closed / config.page_size + near / 2)
    assert text.summary == pytest.approx(closed / config.page_size / 2)
    sparse = text.near_density + text.far_density + text.scoring + text.summary
    assert text.attention_speedup == pytest.approx(1 / sparse)
    attention = 2 * 2 * 2 * 2 * 16 * causal / length  # layers × products × KV heads × group × head_dim
    assert text.model_speedup == pytest.approx((1e6 + attention) / (1e6 + attention * sparse))
    assert text.cache_bytes == 2 * 2 * 2 * 16 * length * 2
    assert text.feature_bytes == round(2 * 2 * 3 * 16 * length / config.page_size * 2)


def test_a_short_text_is_dense() -> None:
    text = at_length(SHAPE, SurgeryConfig(), 0.05, 512)
    assert text.near_density == 1 and text.far_density == text.scoring == 0 and text.attention_speedup == 1


def test_plan_reads_no_weights(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((model / "config.json").read_bytes())
    result = run("plan", config, "--length", "8k,32k", "--json", "--tflops", "10")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [text["length"] for text in told["texts"]] == [8192, 32768]
    # embedding and head of 4096 × 32, two layers of attention, gate, up and down, and norms
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 32 + 2 * 32
    assert told["model"]["parameters"] == 2 * 4096 * 32 + 2 * layer + 32
    learned = told["learning"]
    assert learned["states"] == 16 * 2 * 8192 * 2 * (32 + 16) * told["model"]["dtype_bytes"]
    # layers × heads × (offset, weight of summaries, two weights of every channel)
    assert learned["corrections"] == 2 * 4 * (2 + 2 * 8)
    assert learned["corrections_share"] == learned["corrections"] / told["model"]["parameters"]
    attention = 5 * 2 * 2 * 32 * 8192 * 8193 / 2  # passes × layers × products × query width × pairs
    assert learned["multiplications"] == 200 * (4 * told["model"]["parameters"] * 8192 + attention)
    assert learned["seconds"] == pytest.approx(2 * learned["multiplications"] / 1e13)
    described = run("plan", model)
    assert described.exit_code == 0 and "assumption" in described.output


def test_what_is_no_model_ends_in_one_line(tmp_path: Path) -> None:
    result = run("plan", tmp_path / "none")
    assert result.exit_code == 1 and "no such folder or file" in result.stderr

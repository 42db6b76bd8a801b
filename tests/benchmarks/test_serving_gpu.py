"""The benchmark of a server starts, and writes folders that the engine takes for exported ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from benchmarks import serving_gpu
from llama_surgery.serving.families import read_block


def test_help_needs_no_engine() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving_gpu.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--mode {dense,operated}" in done.stdout


@pytest.mark.parametrize("mode", ["dense", "operated"])
def test_folders(mode: str, tmp_path: Path) -> None:
    serving_gpu.write_folder(serving_gpu.SHAPES, tmp_path / "out", mode, 4096)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 32
    if mode == "dense":
        assert written["architectures"] == ["LlamaForCausalLM"] and "surgery" not in written
    else:
        config, routers = read_block(written["surgery"])
        assert written["architectures"] == ["SurgeryLlamaForCausalLM"]
        assert config.dense_until == 4096 and config.theta > 0 and not config.theta_decode and not routers

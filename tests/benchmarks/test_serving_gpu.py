"""The benchmark of a server starts, and writes folders that the engine takes for exported ones."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import serving_gpu
from llama_surgery.serving.families import read_block


def test_help_needs_no_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serving_gpu.py", "--help"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as ended:
        serving_gpu.main()
    assert not ended.value.code and "--mode {dense,operated,sparse}" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["dense", "operated", "sparse"])
def test_folders(mode: str, tmp_path: Path) -> None:
    serving_gpu.write_folder(serving_gpu.SHAPES, tmp_path / "out", mode, 4096)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 32
    if mode == "dense":
        assert written["architectures"] == ["LlamaForCausalLM"] and "surgery" not in written
    else:
        config, routers = read_block(written["surgery"])
        assert written["architectures"] == ["SurgeryLlamaForCausalLM"]
        assert config.dense_until == 4096 and config.theta > 0 and not routers
        assert (config.theta_decode > 0) is (mode == "sparse")

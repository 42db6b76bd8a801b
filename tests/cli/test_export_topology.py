"""``llama-surgery export-topology``."""

import json
from pathlib import Path

from tests.cli.runner import SMALL, run

from llama_surgery.export.file import read_topology


def test_a_file_is_written_with_and_without_an_adapter(model: Path, text: Path, tmp_path: Path) -> None:
    adapter, plain, small = tmp_path / "adapter", tmp_path / "plain", tmp_path / "new" / "small.npz"
    assert run("operate", model, "--out", adapter, *SMALL).exit_code == 0
    told = run("export-topology", model, "--text", text, "--out", plain, "--length", "700")
    assert told.exit_code == 0, told.output
    assert "700 tokens in 11 tiles" in told.stdout and "plain" in told.stdout
    assert read_topology(plain).length == 700
    told = run("export-topology", model, adapter, "--text", text, "--out", small, "--length", "300", "--json")
    assert told.exit_code == 0, told.output
    topology = read_topology(small)
    assert topology.config.page_size == 16 and topology.pages == 16
    assert json.loads(told.stdout)["far_density"] == topology.far_density() > 0


def test_what_cannot_be_exported_is_said(model: Path, text: Path, tmp_path: Path) -> None:
    for source, target, told in (
        (text.parent, tmp_path / "t.npz", "give one text file"),
        (tmp_path / "nowhere", tmp_path / "t.npz", "no such file"),
        (text, tmp_path, "is a folder"),
    ):
        result = run("export-topology", model, "--text", source, "--out", target)
        assert result.exit_code == 1 and told in result.stderr
    assert list(tmp_path.iterdir()) == []

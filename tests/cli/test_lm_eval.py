"""``llama-surgery lm-eval``."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import run


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    document = {"context": "Once upon a", "choices": ["time", "seven"], "answer": 0}
    data.write_text(json.dumps(document) + "\n", encoding="utf-8")
    # JSON is YAML.
    task = {
        "task": "surgery_small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "small.yaml").write_text(json.dumps(task), encoding="utf-8")
    return tmp_path


def test_a_local_task_runs_in_one_line(model: Path, tasks: Path) -> None:
    path = tasks / "new" / "r.json"
    result = run("lm-eval", model, "--tasks", "surgery_small", "--include", tasks, "--out", path)
    assert result.exit_code == 0, result.output
    assert "surgery_small" in result.stdout and "acc" in result.stdout
    row, *_ = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["dense"] == row["operated"]

"""What commands share: numbers of tokens, loading a model."""

from pathlib import Path

import pytest
import torch

from llama_surgery.cli import common
from llama_surgery.cli.common import Dtype, load_model, split_values, token_counts
from llama_surgery.errors import SurgeryError


def test_token_counts() -> None:
    assert token_counts(["8k,4096", "16K", "8192"]) == [4096, 8192, 16384]
    for wrong in ("k", "0", "-1", "4.5k", "²"):
        with pytest.raises(SurgeryError, match="give a number of tokens"):
            token_counts([wrong])


def test_values_after_commas_and_repeated() -> None:
    assert split_values(["a, b", "", "b,c,"]) == ["a", "b", "c"]


def test_a_model_is_spread_by_accelerate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    split, _ = load_model(str(model), "split", Dtype.float32)
    whole, _ = load_model(str(model), "cpu", Dtype.float32)
    ids = torch.arange(20)[None]
    assert not split.training
    assert torch.equal(split(ids.to(split.device)).logits.cpu(), whole(ids).logits)
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="pip install accelerate"):
        load_model(str(model), "split", Dtype.auto)

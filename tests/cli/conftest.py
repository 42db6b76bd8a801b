"""A checkpoint and a text small enough for whole commands."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Path:
    """A tiny random model with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    whole = (demo_model_path.parent / "text" / "calibration.txt").read_text(encoding="utf-8")
    path.write_text(whole[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four documents, two for calibration and two to measure on."""
    folder = tmp_path_factory.mktemp("texts") / "books"
    folder.mkdir()
    for number in range(4):
        shutil.copy(text, folder / f"{number}.txt")
    return folder

"""A tokenizer, texts and tiny random models for the evaluation tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@pytest.fixture(scope="session")
def tokenizer(demo_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model_path)


@pytest.fixture(scope="session")
def texts(demo_model_path: Path) -> list[str]:
    """Three documents of about 9,000 tokens each."""
    text = (demo_model_path.parent / "text" / "evaluation.txt").read_text(encoding="utf-8")
    return [text[start : start + 30_000] for start in (0, 30_000, 60_000)]


@pytest.fixture
def tiny_llama(make_llama: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return make_llama()


@pytest.fixture(scope="session")
def make_llama() -> Callable[[], PreTrainedModel]:
    return _llama


def _llama() -> PreTrainedModel:
    """Random weights, 4 query and 2 KV heads of 16, the demo model's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        # Large enough that attention and predictions are far from uniform.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()

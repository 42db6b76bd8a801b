"""A small random model of every other family behind the server writes what generate() writes."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import Reference, Server, complete, exported

from llama_surgery import SurgeryConfig

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.02, theta_decode=0.01)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_family(family: str, demo_model_path: Path, tmp_path: Path, summary: list[str]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # sharp enough to attend unevenly
                weight.normal_(0, 0.15)
    source = tmp_path / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path / name, source)
    served = exported(model, source, tmp_path, CONFIG)
    reference = Reference(model, torch.randint(1, 4096, (2000,)).tolist(), summary)
    prompts = reference.prompts(8, 20, 900)
    want = reference.write(prompts, CONFIG)
    server = Server(served, tmp_path / "log.txt").start()
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    reference.assert_equal(f"{family}, random weights, 8 at once", prompts, want, got)

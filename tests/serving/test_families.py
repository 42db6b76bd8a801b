"""Small random models behind the server write what generate() writes: other families, and the kernels."""

import dataclasses
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

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.02)


def check(
    family: str,
    backend: str,
    lengths: tuple[int, int, int],
    demo_model_path: Path,
    folder: Path,
    summary: list[str],
    theta_decode: float = 0.0,
    **environment: str,
) -> Server:
    """Serve a model, compare, and stop. ``lengths``: how many prompts, the shortest and the longest."""
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
    source = folder / "source"
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path / name, source)
    surgery = dataclasses.replace(CONFIG, backend=backend, theta_decode=theta_decode)  # type: ignore[arg-type]
    served = exported(model, source, folder, surgery)
    reference = Reference(model, torch.randint(1, 4096, (2000,)).tolist(), summary)
    prompts = reference.prompts(*lengths)
    want = reference.write(prompts, surgery)
    server = Server(served, folder / "log.txt", **environment).start()
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    what = f"{family}, random weights, backend {backend}, θ of decode {theta_decode}, all at once"
    reference.assert_equal(what, prompts, want, got)
    return server


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_family(family: str, demo_model_path: Path, tmp_path: Path, summary: list[str]) -> None:
    server = check(family, "auto", (8, 20, 900), demo_model_path, tmp_path, summary)
    assert "2 layers executed by plain PyTorch" in server.text()


@pytest.mark.parametrize("theta_decode", [0.0, 0.01])
def test_kernels_read_the_engine_s_cache(
    theta_decode: float, demo_model_path: Path, tmp_path: Path, summary: list[str]
) -> None:
    """Under Triton's interpreter, where there is no GPU."""
    folders = demo_model_path, tmp_path, summary
    server = check("Llama", "triton", (3, 60, 300), *folders, theta_decode, TRITON_INTERPRET="1")
    assert "2 layers executed by Triton kernels" in server.text()

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

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.1)


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
    want, modes, rounds = [reference.write(prompts, surgery)], [False], 1
    if backend == "auto":  # dense requests among them, and all again out of the cache
        want.append(reference.write(prompts, None))
        modes, rounds = [False, True], 2
        assert want[0] != want[1]
    jobs = [(prompt, dense) for prompt in rounds * prompts for dense in modes]
    server = Server(served, folder / "log.txt", **environment).start()
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda job: complete(server.client(), job[0], dense=job[1]), jobs))
    finally:
        server.kill()
    what = f"{family}, random weights, backend {backend}, θ of decode {theta_decode}, all at once"
    for expected, dense in zip(want, modes, strict=True):
        told = f"{what}, asked for dense attention" if dense else what
        reference.assert_equal(told, rounds * prompts, rounds * expected, got[dense :: len(modes)])
    return server


@pytest.mark.parametrize(
    ("family", "theta_decode"), [("Mistral", 0.0), ("Qwen2", 0.0), ("Qwen3", 0.0), ("Llama", 0.01)]
)
def test_family(
    family: str, theta_decode: float, demo_model_path: Path, tmp_path: Path, summary: list[str]
) -> None:
    folders = demo_model_path, tmp_path, summary
    server = check(family, "auto", (8, 20, 900), *folders, theta_decode)
    assert "2 layers executed by plain PyTorch" in server.text()


@pytest.mark.parametrize("theta_decode", [0.0, 0.01])
def test_kernels_read_the_engine_s_cache(
    theta_decode: float, demo_model_path: Path, tmp_path: Path, summary: list[str]
) -> None:
    """Under Triton's interpreter, where there is no GPU."""
    folders = demo_model_path, tmp_path, summary
    server = check("Llama", "triton", (3, 60, 300), *folders, theta_decode, TRITON_INTERPRET="1")
    assert "2 layers executed by Triton kernels" in server.text()

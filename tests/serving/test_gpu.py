"""An engine on a GPU, with CUDA graphs and asynchronous scheduling, against generate() of a random model."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import NEW, Reference, exported

from llama_surgery import SurgeryConfig

pytestmark = [
    pytest.mark.serve,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONFIG = SurgeryConfig(chunk_size=256, page_size=32, window=64, theta=0.02)
#: The engine's attention in float32 multiplies in TensorFloat-32.
TIE = 2e-2


@pytest.fixture(scope="module")
def gpu_reference(summary: list[str]) -> Reference:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # sharp enough to attend unevenly
                weight.normal_(0, 0.15)
    return Reference(model, torch.randint(1, 4096, (8000,)).tolist(), summary, TIE)


@pytest.fixture(scope="module")
def engine(gpu_reference: Reference, tmp_path_factory: Any) -> Iterator[Any]:
    """So few blocks that sequences are preempted."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    folder = tmp_path_factory.mktemp("gpu")
    gpu_reference.model.save_pretrained(folder / "source")
    served = exported(gpu_reference.model, folder / "source", folder, CONFIG)
    gpu_reference.model.to("cuda")
    yield LLM(
        str(served),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.3,
        num_gpu_blocks_override=24,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )


def ask(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=NEW, temperature=0, detokenize=False, ignore_eos=True)
    outs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


def test_engine_writes_what_generate_writes(gpu_reference: Reference, engine: Any) -> None:
    config = engine.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
    assert config.scheduler_config.async_scheduling
    prompts = gpu_reference.prompts(14, 50, 3000)
    want = gpu_reference.write(prompts, CONFIG)
    gpu_reference.assert_equal("on a GPU, all at once", prompts, want, ask(engine, prompts))
    gpu_reference.assert_equal("on a GPU, out of the cache", prompts, want, ask(engine, prompts))

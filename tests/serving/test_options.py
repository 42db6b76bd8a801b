"""Before anything is loaded: options that are refused, with the reason, and options that the plugin sets."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from vllm import ModelRegistry
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from llama_surgery.serving.families import FAMILIES
from llama_surgery.serving.vllm import compat
from llama_surgery.serving.vllm.plugin import register
from llama_surgery.serving.vllm.scheduler import TileScheduler

pytestmark = pytest.mark.serve

SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
TRANSFER = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


@pytest.fixture(scope="module")
def build(sparse_folder: Path) -> Callable[..., Any]:
    """The engine's configuration as `vllm serve` makes it, from options."""
    load_general_plugins()

    def build(**options: Any) -> Any:
        given = {"max_num_batched_tokens": 512, "dtype": "float32", "enforce_eager": True, **options}
        return EngineArgs(model=str(sparse_folder), **given).create_engine_config()

    return build


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: quantised keys and values"),
        ({"block_size": 128}, "a cache block must be a whole chunk, 512 tokens"),
        ({"speculative_config": SPECULATIVE}, "--speculative-config is not supported: rejected tokens"),
        ({"kv_transfer_config": TRANSFER}, "--kv-transfer-config is not supported: the side cache"),
        ({"enable_lora": True}, "--enable-lora is not supported: thresholds"),
        ({"tensor_parallel_size": 8}, "4 KV heads on 8 tensor ranks"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "a chunk must lie on one rank"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "prompts must be cut at whole tiles"),
        ({"max_num_seqs": 500}, "--max-num-batched-tokens 512: with --max-num-seqs 500 at least 563"),
        ({"max_num_scheduled_tokens": 64}, "--max-num-scheduled-tokens 64: with --max-num-seqs"),
        ({"long_prefill_token_threshold": 16}, "--long-prefill-token-threshold 16: a piece of a prompt"),
        ({"model_impl": "transformers"}, "SurgeryLlamaForCausalLM"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refused(build: Callable[..., Any], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(**options)


def test_what_is_set(build: Callable[..., Any]) -> None:
    config = build()
    assert config.cache_config.block_size == 512 and config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.scheduler_cls.endswith("TileScheduler")
    assert build(block_size=512, async_scheduling=False).cache_config.block_size == 512
    assert config.model_config.logits_processors == ["llama_surgery.serving.vllm.modes:BatchModes"]


def test_scheduling_is_as_asynchronous_as_the_engine_s(build: Callable[..., Any]) -> None:
    config = build()
    for asynchronous in (False, True):
        config.scheduler_config.async_scheduling = asynchronous
        made = TileScheduler.__new__(TileScheduler, config)
        assert isinstance(made, AsyncScheduler) == asynchronous and isinstance(made, TileScheduler)


def test_registering_twice_changes_nothing(build: Callable[..., Any]) -> None:
    before = sorted(ModelRegistry.get_supported_archs())
    register()
    assert sorted(ModelRegistry.get_supported_archs()) == before and set(FAMILIES.values()) <= set(before)


def test_engines_that_were_not_tested(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "SUPPORTED", ("0.1",))
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *_: pytest.fail("registered"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "llama-surgery is not active" in caplog.text and "serves on 0.1.x" in caplog.text

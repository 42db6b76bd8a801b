"""Ways of calling an operated model: what works, and what is refused before anything changes."""

import contextlib

import peft
import pytest
import torch
import transformers
from tests.surgery.test_operate import trace
from tests.surgery.tiny import DENSE_LIMIT, SIZES, SPARSE, build, logits, tokens
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from llama_surgery import (
    SurgeryError,
    UnsupportedModelError,
    eject,
    is_operated,
    operate,
    operated,
)
from llama_surgery.surgery import operate as operating
from llama_surgery.surgery.compat import CACHE_NAME


@pytest.fixture
def model() -> PreTrainedModel:
    return build("Llama")


@pytest.mark.parametrize(
    "start",
    [
        lambda model: model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2)),
        lambda model: model.init_continuous_batching(),
        lambda model: model.continuous_batching_context_manager().__enter__(),
    ],
    ids=["generate_batch", "manager", "context"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_continuous_batching_is_refused(model, start, wrapped):
    """transformers would advise to switch to its own attention, on a cache that it cannot read."""
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with operated(model, SPARSE):
        with pytest.raises(
            UnsupportedModelError, match=r"continuous batching.*eject\(model\) first"
        ) as refusal:
            start(model)
        assert "sdpa" not in str(refusal.value)
        logits(model, tokens(1, 100))


def test_a_batching_manager_from_before_the_operation_is_refused(model):
    class Running(transformers.generation.continuous_batching.cache.PagedAttentionCache):
        def __init__(self) -> None:
            pass

    with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match="continuous batching"):
        logits(model, tokens(1, 20), **{CACHE_NAME: Running()})


@pytest.mark.parametrize("columns", [0, 1, 100])
def test_a_mask_that_is_too_short_is_refused_with_the_reason(model, columns):
    ids = tokens(1, 150)
    with operated(model, SPARSE):
        with pytest.raises(
            SurgeryError, match=f"mask of {columns} columns, but 0 .* cached and 150 are new"
        ) as short:
            logits(model, ids, attention_mask=torch.ones(1, columns, dtype=torch.int64))
        assert "fixed size" not in str(short.value)
        cache = model(ids)[CACHE_NAME]
        with pytest.raises(SurgeryError, match="but 150 tokens are cached and 1 are new: it needs a column"):
            logits(model, ids[:, :1], attention_mask=torch.ones(1, 1), **{CACHE_NAME: cache})


def test_columns_of_a_mask_beyond_the_keys_stand_for_none(model):
    ids, mask = tokens(1, 100), torch.ones(1, 120, dtype=torch.int64)
    mask[:, 100:] = 0
    expected = logits(model, ids, attention_mask=mask)
    with operated(model, DENSE_LIMIT):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_fixed_size_is_refused_as_such(model):
    ids = tokens(1, 40)
    for mask in (None, torch.ones_like(ids)):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match="caches of fixed size"):
            logits(model, ids, attention_mask=mask, **{CACHE_NAME: cache})


def test_prompt_tuning_gives_the_real_reason_or_the_answer(model):
    """PEFT's masks of padded prompts fit some releases of transformers and not others."""
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    wrapped = peft.get_peft_model(model, settings).eval()
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    mask[1, :30] = 0
    arguments = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        dense = wrapped(**arguments).logits[:, 38:]
    with operated(wrapped, DENSE_LIMIT), torch.no_grad():
        torch.testing.assert_close(wrapped(**arguments).logits[:, 38:], dense, rtol=1e-5, atol=1e-5)
        with contextlib.suppress(SurgeryError):
            wrapped.generate(**arguments, max_new_tokens=3, do_sample=False)
            return
        with pytest.raises(SurgeryError, match=r"tokens are cached and .* are new") as refusal:
            wrapped.generate(**arguments, max_new_tokens=3, do_sample=False)
        assert "fixed size" not in str(refusal.value)


def omni() -> PreTrainedModel:
    text = {name: size for name, size in SIZES.items() if name != "head_dim"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    thinker = {
        "text_config": text,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
        "audio_config": {
            "encoder_layers": 1,
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "num_mel_bins": 16,
        },
    }
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return transformers.Qwen2_5OmniForConditionalGeneration(config).eval()


def test_a_model_without_a_forward_names_the_part_to_operate_on():
    model, ids = omni(), tokens(1, 150)
    places = torch.arange(150).expand(3, 1, 150)
    before = trace(model)
    dense = logits(model.thinker, ids, position_ids=places)
    with pytest.raises(UnsupportedModelError, match=r"has no forward.*operate\(model\.thinker\)"):
        operate(model, SPARSE)
    assert trace(model) == before and not is_operated(model)
    with operated(model.thinker, DENSE_LIMIT):
        got = logits(model.thinker, ids, position_ids=places)
        assert model.config.thinker_config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)
    assert trace(model) == before


@pytest.mark.parametrize("step", ["hook", "LayerSurgery", "calibrate"])
def test_an_operation_that_fails_half_way_leaves_no_trace(model, step, monkeypatch):
    """Whatever goes wrong, at whatever step."""
    other = build("Llama", 1)
    before, ids = trace(model), tokens(1, 100)
    dense = logits(model, ids)
    operate(other, SPARSE)
    expected = logits(other, ids)

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(operating, "calibration_windows", lambda *_: tokens(1, 100)[None])
    monkeypatch.setattr(operating, "budgets_where_none", lambda *_: None)
    monkeypatch.setattr(operating, "calibrate", lambda *_, **__: SPARSE)
    monkeypatch.setattr(operating, step, broken)
    with pytest.raises(KeyboardInterrupt):
        operate(model, SPARSE, density=0.1, text=["words"])
    assert not is_operated(model) and trace(model) == before
    assert torch.equal(logits(model, ids), dense)
    assert torch.equal(logits(other, ids), expected)
    eject(other)

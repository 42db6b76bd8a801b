"""Precision that is changed by others: autocast, half(), routers and weights that wait elsewhere."""

import accelerate
import pytest
import torch
from tests.surgery.tiny import DENSE_LIMIT, SPARSE, build, logits, tokens
from transformers import PreTrainedModel, Trainer, TrainingArguments

from llama_surgery import SurgeryError, load_adapter, operated, save_adapter
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import routers_of
from llama_surgery.topology.router import PageRouter


@pytest.fixture
def model() -> PreTrainedModel:
    return build("Llama", dtype=torch.float32)


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_casts_as_it_does_on_the_dense_model(model, dtype, use_cache):
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with autocast(dtype):
        dense = logits(model, ids, attention_mask=mask, use_cache=use_cache)
    with operated(model, DENSE_LIMIT), autocast(dtype):
        got = logits(model, ids, attention_mask=mask, use_cache=use_cache)
    assert got.dtype == dense.dtype
    off = (got - dense)[mask.bool()].float().abs()
    exact = (logits(model, ids, attention_mask=mask) - dense)[mask.bool()].float().abs()
    assert off.mean() <= exact.mean() and off.max() <= 2 * exact.max()


def test_autocast_leaves_float64_alone():
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        expected = logits(model, ids)
        with autocast(enabled=False):
            assert torch.equal(logits(model, ids), expected)
    with autocast():
        dense = logits(model, ids)
    with operated(model, DENSE_LIMIT), autocast():
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-6, atol=1e-6)


def test_steps_under_autocast_go_on_from_a_prompt_under_autocast(model):
    ids = tokens(1, 150)
    with operated(model, SPARSE), autocast():
        whole = logits(model, ids)
        cache = model(ids[:, :144])[CACHE_NAME]
        rest = logits(model, ids[:, 144:], **{CACHE_NAME: cache})
        assert cache.paged[0].dtype == torch.bfloat16
        model.generate(ids, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(rest, whole[:, 144:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.double(),
    ],
    ids=["bfloat16", "half", "double"],
)
def test_precision_changed_between_two_calls_on_one_cache_is_refused(model, change):
    ids = tokens(1, 150)
    with operated(model, SPARSE):
        cache = model(ids)[CACHE_NAME]
        change(model)
        with pytest.raises(SurgeryError, match="Start with a new cache"):
            logits(model, ids[:, :1], **{CACHE_NAME: cache})
        model.generate(ids, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("first", [True, False])
def test_autocast_on_in_one_call_and_off_in_the_next_is_refused(model, first):
    ids = tokens(1, 150)
    with operated(model, SPARSE):
        with autocast(enabled=first):
            cache = model(ids)[CACHE_NAME]
        with autocast(enabled=not first), pytest.raises(SurgeryError, match="autocast"):
            logits(model, ids[:, :1], **{CACHE_NAME: cache})


def test_gradients_flow_through_autocast(model):
    ids = tokens(1, 150)
    model.train()
    with operated(model, DENSE_LIMIT), autocast():
        model(ids, labels=ids).loss.backward()
    sparse = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with autocast():
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert sparse[name].dtype == torch.float32
        torch.testing.assert_close(sparse[name], parameter.grad, rtol=0.1, atol=0.02)


def test_training_in_bfloat16_with_the_trainer(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 130)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True, report_to=[]
    )
    with operated(model, SPARSE):
        result = Trainer(model, arguments, train_dataset=rows).train()
    assert result.global_step == 2 and 0 < result.training_loss < 20


def routers() -> dict[int, PageRouter]:
    generator = torch.Generator().manual_seed(0)
    return {i: PageRouter(offset=torch.randn(2, 2, generator=generator)) for i in (0, 1)}


def test_learned_corrections_survive_where_weights_are_offloaded(model, tmp_path):
    """Offloaded weights lie on the meta device, on which a tensor has no values."""
    ids = tokens(1, 200)
    with operated(model, SPARSE, routers=routers()):
        expected = logits(model, ids)
    with operated(model, SPARSE):
        assert not torch.allclose(logits(model, ids), expected), "they do matter"
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].self_attn.parameters()).is_meta
    with operated(model, SPARSE, routers=routers()):
        torch.testing.assert_close(logits(model, ids), expected)
        save_adapter(model, tmp_path)
        for index, router in routers_of(model).items():
            assert torch.equal(router.offset, routers()[index].offset)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), expected)

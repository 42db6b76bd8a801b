"""What a recorded step hangs on: where any of it was replaced, nothing stale is replayed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("triton")

from tests.attention.triton.test_corrections import learned
from tests.attention.triton.test_decode_model import CONFIG, tiny, tokens

import llama_surgery as surgery
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import set_config, surgery_of
from llama_surgery.surgery.steps import GraphedSteps


@contextlib.contextmanager
def stepping(
    model: PreTrainedModel, ids: torch.Tensor, *, theta: float = CONFIG.theta_decode, **options: object
) -> Iterator[tuple[GraphedSteps, surgery.PagedCache, list[int]]]:
    """Steps of an operated model after a prompt, its cache, and how often a step was recorded."""
    records: list[int] = []
    plain = GraphedSteps._record

    def record(steps: GraphedSteps) -> None:
        records.append(1)
        plain(steps)

    config = dataclasses.replace(CONFIG, backend="triton", theta_decode=theta)
    operated = surgery.operated(model, config, **options)
    with operated, torch.no_grad(), mock.patch.object(GraphedSteps, "_record", record):
        cache = surgery.paged_cache(model)
        model(ids, **{CACHE_NAME: cache})
        steps = GraphedSteps(model, cache)
        steps.step(ids[:, :1])
        steps.step(ids[:, :1])
        assert len(records) == 1
        yield steps, cache, records


def _replace_router(model: PreTrainedModel) -> None:
    surgery_of(model)[0].router = learned(2, 2, 16, model.device)


def _replace_part_of_router(model: PreTrainedModel) -> None:
    layer = surgery_of(model)[0]
    layer.router = dataclasses.replace(layer.router, offset=layer.router.offset + 0.1)


def _drop_router(model: PreTrainedModel) -> None:
    surgery_of(model)[0].router = None


def _replace_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)


def _replace_data_of_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 2


def _replace_module(model: PreTrainedModel) -> None:
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())


def _start_counting_anew(model: PreTrainedModel) -> None:
    held.append(surgery_of(model)[0].counters[1])  # its memory is not to be handed out again
    surgery.reset_statistics(model)


held: list[object] = []


@pytest.mark.parametrize(
    "change",
    [
        _replace_router, _replace_part_of_router, _drop_router, _replace_weight, _replace_data_of_weight,
        _replace_module, _start_counting_anew,
    ],
)  # fmt: skip
def test_a_step_is_recorded_anew_where_what_it_was_recorded_with_was_replaced(
    change: Callable[[PreTrainedModel], None], device: torch.device
) -> None:
    model, ids = tiny(device), tokens(1, 60).to(device)  # beyond the near field
    with stepping(model, ids, routers={0: learned(2, 2, 16, device)}) as (steps, cache, records):
        change(model)
        got = steps.step(ids[:, :1]).clone()
        assert len(records) == 2
        cache.crop(-1)
        expected = model(ids[:, :1], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        steps.step(ids[:, :1])
        assert len(records) == 2


def test_a_step_that_can_no_longer_be_recorded_is_not_replayed(device: torch.device) -> None:
    """Another configuration: not in silence, and not in the next call either."""
    model, ids = tiny(device), tokens(1, 20).to(device)
    with stepping(model, ids) as (steps, cache, _):
        steps.step(ids[:, :1])
        config = surgery_of(model)[0].config
        set_config(model, dataclasses.replace(config, theta_decode=0.5))
        for _ in range(2):
            with pytest.raises(surgery.SurgeryError, match="made for another model or configuration"):
                steps.step(ids[:, :1])
        set_config(model, config)
        assert cache.get_seq_length() == cache.paged[0].lengths[0] == 23
        surgery.eject(model)
        with pytest.raises(surgery.SurgeryError, match="not operated"):
            steps.step(ids[:, :1])
        surgery.operate(model, config)
        got = steps.step(ids[:, :1])
        assert cache.get_seq_length() == 24 and got.isfinite().all()


def test_steps_after_a_crop_and_a_choice_of_sequences(device: torch.device) -> None:
    model, ids = tiny(device), tokens(2, 26).to(device)
    with stepping(model, ids[:, :22]) as (steps, cache, records):
        cache.crop(-4)
        with pytest.raises(surgery.SurgeryError, match="a step of this cache takes"):
            steps.step(ids[:1, :1])
        with pytest.raises(surgery.SurgeryError, match="a step of this cache takes"):
            steps.step(ids[:, :1].float())
        got = [steps.step(ids[:, at : at + 1])[1:].clone() for at in (20, 21)]
        cache.batch_select_indices(torch.tensor([1], device=device))
        got += [steps.step(ids[1:, at : at + 1]).clone() for at in (22, 23)]
        assert len(records) == 2
        expected = model(ids[1:, :24]).logits[:, 20:]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-4)
        cache.reset()
        with pytest.raises(surgery.SurgeryError, match="the cache was reset"):
            steps.step(ids[1:, :1])


@pytest.mark.parametrize("theta", [0.0, CONFIG.theta_decode])
def test_chunks_are_laid_out_when_a_step_asks_for_pages(theta: float, device: torch.device) -> None:
    """From position 48 on a row has a far field; one that reads all of it asks for no page."""
    model, ids, found = tiny(device), tokens(1, 70).to(device), []
    with stepping(model, ids[:, :30], theta=theta) as (steps, cache, records):
        surgery.reset_statistics(model)
        for at in range(32, 66):
            found.append(steps.step(ids[:, at : at + 1]).clone())
            assert cache.paged[0].stores[0].laid == (at // 32 * 32 if theta and at >= 48 else 0)
        assert len(records) == (3 if theta else 2)  # the tensors grew once
        counted = surgery.statistics(model)
    plain = dataclasses.replace(CONFIG, backend="gather", theta_decode=theta)
    with surgery.operated(model, plain), torch.no_grad():
        cache = surgery.paged_cache(model)
        model(ids[:, :30], **{CACHE_NAME: cache})
        for _ in range(2):
            model(ids[:, :1], **{CACHE_NAME: cache})
        surgery.reset_statistics(model)
        expected = [model(ids[:, at : at + 1], **{CACHE_NAME: cache}).logits for at in range(32, 66)]
        torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=1e-3, atol=1e-3)
        assert surgery.statistics(model) == counted


def test_a_padded_cache_that_was_cropped_needs_its_mask(device: torch.device) -> None:
    model, ids = tiny(device), tokens(2, 26).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="triton")), torch.no_grad():
        cache = surgery.paged_cache(model)
        every = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids[:, :22], attention_mask=mask[:, :22], position_ids=every[:, :22], **{CACHE_NAME: cache})
        cache.crop(-2)
        steps = GraphedSteps(model, cache)
        with pytest.raises(surgery.SurgeryError, match="known from the attention mask alone"):
            steps.step(ids[:, 20:21])
        model(ids[:, 20:21], attention_mask=mask[:, :21], position_ids=every[:, 20:21], **{CACHE_NAME: cache})
        got = steps.step(ids[:, 21:22])
        expected = model(ids[:, :22], attention_mask=mask[:, :22], position_ids=every[:, :22]).logits
        torch.testing.assert_close(got, expected[:, -1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 9])
def test_steps_of_as_many_tokens_as_the_kernels_take(rows: int, device: torch.device) -> None:
    model, ids = tiny(device), tokens(1, 20).to(device)
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="triton")), torch.no_grad():
        cache = surgery.paged_cache(model)
        model(ids, **{CACHE_NAME: cache})
        with pytest.raises(surgery.SurgeryError, match="1 to 8"):
            GraphedSteps(model, cache, rows)


@pytest.mark.parametrize("theta", [0.0, CONFIG.theta_decode])
def test_a_loop_of_steps_says_what_generate_says(theta: float, device: torch.device) -> None:
    model, ids, found = tiny(device), tokens(1, 60).to(device), []
    config = dataclasses.replace(CONFIG, backend="triton", theta_decode=theta)
    with surgery.operated(model, config), torch.no_grad():
        cache = surgery.paged_cache(model)
        with cache.prompt(60):
            logits = model(ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits
        steps = surgery.GraphedSteps(model, cache)
        for _ in range(8):
            found.append(logits[:, -1:].argmax(-1))
            logits = steps.step(found[-1])
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.cat(found, 1), expected[:, 60:])


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 300])
@pytest.mark.parametrize("rows", [1, 4])
def test_captured_steps_that_read_everything_are_the_dense_model(rows: int, padding: int) -> None:
    """With the defaults: prompts are the model's own attention, and nothing is ever known of pages."""
    model, ids = tiny(torch.device("cuda")), tokens(2, 1416).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    every = (mask.cumsum(1) - 1).clamp_min(0)

    def call(stop: int, **cache: object) -> torch.Tensor:
        masked = {"attention_mask": mask[:, :stop], "position_ids": every[:, :stop]}
        return model(ids[:, :stop], **masked, **cache).logits

    with torch.no_grad():
        expected = call(1416)[:, 1400:]
        with surgery.operated(model, surgery.SurgeryConfig(dense_until=4096)):
            cache = surgery.paged_cache(model)
            call(1400, **{CACHE_NAME: cache})
            steps = GraphedSteps(model, cache, rows)
            found = [steps.step(ids[:, at : at + rows]).clone() for at in range(1400, 1416, rows)]
            assert surgery.statistics(model).total_density == pytest.approx(1.0)
        if not padding:
            assert cache.paged[0].buffers._tensors.keys() == {"keys", "values"}
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=2e-3, atol=2e-3)

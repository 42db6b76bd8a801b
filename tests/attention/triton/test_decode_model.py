"""Decode steps of operated models go through the decode kernels, and say what plain PyTorch says."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytest.importorskip("triton")

from tests.attention.triton.test_corrections import learned
from tests.learning.test_gates import corrections

import llama_surgery as surgery
from llama_surgery.attention.impl.triton.decode import launch as decode_module
from llama_surgery.config import SurgeryConfig
from llama_surgery.learning.corrections import scorer_parameters
from llama_surgery.surgery import steps as steps_module
from llama_surgery.surgery.adapter import write_adapter
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import surgery_of
from llama_surgery.surgery.steps import GraphedSteps
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(
    chunk_size=32,
    page_size=8,
    window=16,
    tile=16,
    theta=0.12,
    theta_decode=0.12,
)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(device: torch.device, kind: type = LlamaForCausalLM, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, GptOssForCausalLM: GptOssConfig}[kind](**SIZES, **more)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15) if weight.dim() > 1 else None
    return model.to(device).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Rows of every call of the decode kernels."""
    rows: list[int] = []
    plain = decode_module.decode

    def decode(queries: torch.Tensor, *args: object, **kwargs: object) -> object:
        rows.append(queries.shape[2])
        return plain(queries, *args, **kwargs)

    with mock.patch.object(decode_module, "decode", decode):
        yield rows


def both(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    config: SurgeryConfig = CONFIG,
    routers: dict[int, PageRouter] | None = None,
    **options: object,
) -> tuple[list[int], surgery.Statistics]:
    """Generate with plain PyTorch and with the kernels: the same tokens, logits and counts."""
    outs, counts = [], []
    for backend in ("gather", "triton"):
        with (
            surgery.operated(model, dataclasses.replace(config, backend=backend), routers=routers),
            counted() as rows,
        ):
            outs.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                    **options,
                )
            )
            counts.append(surgery.statistics(model))
    plain, ours = outs
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert counts[1] == counts[0]
    assert 0 < counts[0].by_tile["1"]["far_density"] < 0.6
    return rows, counts[1]


def test_generated_tokens_are_those_of_plain_pytorch(device: torch.device) -> None:
    """A chunk fills and another closes on the way."""
    ids = tokens(1, 62).to(device)
    rows, _ = both(tiny(device), ids, torch.ones_like(ids), max_new_tokens=20)
    assert rows == [1] * 19


def test_a_learned_adapter_answers_as_with_plain_pytorch(tmp_path: Path, device: torch.device) -> None:
    """A chunk fills on the way: its keys are ordered as the learned map sees them."""
    model, ids = tiny(device), tokens(1, 62).to(device)
    routers = scorer_parameters(corrections(1).float())
    answers = {}
    for backend in ("gather", "triton"):
        adapter = dataclasses.replace(CONFIG, backend=backend)
        write_adapter(tmp_path / backend, model, adapter, {0: routers[0]})
        surgery.load_adapter(model, tmp_path / backend)
        try:
            with counted() as rows:
                answers[backend] = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=8,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
        finally:
            surgery.eject(model)
    assert rows == [1] * 7
    plain, ours = answers.values()
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("summary", ["none", "page"])
def test_other_rules_decode_in_the_kernels(summary: str, device: torch.device) -> None:
    config = dataclasses.replace(CONFIG, summary=summary)
    ids = tokens(1, 62).to(device)
    routers = {0: learned(2, 2, 16, device)}
    rows, _ = both(tiny(device), ids, torch.ones_like(ids), config, routers, max_new_tokens=8)
    assert rows == [1] * 7


def test_left_padded_batches(device: torch.device) -> None:
    ids = tokens(3, 76).to(device)
    mask = torch.ones_like(ids)
    mask[0, :21], mask[2, :50] = 0, 0
    rows, _ = both(tiny(device), ids.where(mask.bool(), 0), mask, max_new_tokens=7)
    assert rows == [1] * 6


def test_beams_reorder_what_the_kernels_read(device: torch.device) -> None:
    ids = tokens(1, 64).to(device)
    rows, _ = both(tiny(device), ids, torch.ones_like(ids), max_new_tokens=5, num_beams=2)
    assert rows


def test_sinks_of_the_model(device: torch.device) -> None:
    model = tiny(
        device, GptOssForCausalLM, layer_types=["full_attention"], num_local_experts=2, num_experts_per_tok=1
    )
    ids = tokens(1, 64).to(device)
    rows, _ = both(model, ids, torch.ones_like(ids), max_new_tokens=6)
    assert rows == [1] * 5


def test_several_rows_cropping_and_going_on(device: torch.device) -> None:
    """As assisted generation calls: several tokens at once, some of them taken back, across a chunk's end."""
    model, ids = tiny(device), tokens(1, 91).to(device)
    found = {}
    for backend in ("gather", "triton"):
        config = dataclasses.replace(CONFIG, backend=backend)
        with surgery.operated(model, config), counted() as rows, torch.no_grad():
            cache, logits = surgery.paged_cache(model), []
            calls = ((64, 71, 4), (67, 74, 0), (74, 82, 0), (82, 91, 0))
            with cache.prompt(64):
                model(ids[:, :64], **{CACHE_NAME: cache})
                for start, stop, taken_back in calls:
                    logits.append(model(ids[:, start:stop], **{CACHE_NAME: cache}).logits)
                    if taken_back:
                        cache.crop(-taken_back)
            found[backend] = torch.cat(logits, 1)
    assert rows == [7, 7, 8]  # and the last call, of more rows, without the decode kernels
    torch.testing.assert_close(found["triton"], found["gather"], rtol=1e-3, atol=1e-3)


def test_what_the_decode_kernels_refuse_is_executed_as_before(device: torch.device) -> None:
    model, ids = tiny(device), tokens(1, 64).to(device)
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="triton")), counted() as rows:
        cache = surgery.paged_cache(model)
        with torch.no_grad():
            model(ids, **{CACHE_NAME: cache})
        model(ids[:, :1], **{CACHE_NAME: cache}).logits.sum().backward()  # gradients
        assert rows == []


def test_statistics_start_anew(device: torch.device) -> None:
    model, ids = tiny(device), tokens(1, 64).to(device)
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="triton")), torch.no_grad():
        cache = surgery.paged_cache(model)
        model(ids, **{CACHE_NAME: cache})
        surgery.reset_statistics(model)
        model(ids[:, :1], **{CACHE_NAME: cache})
        once = surgery.statistics(model)
        assert once.rows == 1 and once.pages_read > 0
        assert set(surgery_of(model)[0].counters) == {1}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("theta", [0.0, CONFIG.theta_decode])
def test_replayed_steps_say_what_calls_say(
    theta: float, corrected: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of two lengths; a chunk fills, the tensors grow and the counters start anew on the way."""
    monkeypatch.setattr(steps_module, "ROOM", 32)
    model, ids = tiny(device), tokens(2, 70).to(device)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    start, stop = 62, 67
    routers = {0: learned(2, 2, 16, device)} if corrected else None
    rule = {"theta_decode": theta, "summary": "page" if corrected else "none"}
    config = dataclasses.replace(CONFIG, backend="triton", **rule)
    with surgery.operated(model, config, routers=routers), torch.no_grad():
        expected, caches = [], [surgery.paged_cache(model) for _ in range(2)]
        for cache in caches:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, :start]
            cache.expect_length(start + 2)
            model(
                ids[:, :start], attention_mask=mask[:, :start], position_ids=positions, **{CACHE_NAME: cache}
            )
        surgery.reset_statistics(model)
        for at in range(start, stop):
            out = model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=mask[:, : at + 1].sum(1, keepdim=True) - 1,
                **{CACHE_NAME: caches[0]},
            )
            expected.append(out.logits)
        wanted = surgery.statistics(model)
        surgery.reset_statistics(model)
        steps = GraphedSteps(model, caches[1])
        got = [steps.step(ids[:, at : at + 1]).clone() for at in range(start, stop)]
        torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
        assert surgery.statistics(model) == wanted
        assert caches[1].get_seq_length() == stop
        surgery.reset_statistics(model)
        steps.step(ids[:, :1])
        assert surgery.statistics(model).rows == 2


def test_what_cannot_be_captured_is_refused(device: torch.device) -> None:
    model, ids = tiny(device), tokens(1, 40).to(device)
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="gather")), torch.no_grad():
        cache = surgery.paged_cache(model)
        with pytest.raises(surgery.SurgeryError, match="an empty cache"):
            GraphedSteps(model, cache)
        model(ids, **{CACHE_NAME: cache})
        with pytest.raises(surgery.SurgeryError, match="only where the decode kernels run it"):
            GraphedSteps(model, cache).step(ids[:, :1])


def test_steps_inside_and_outside_of_inference_mode(device: torch.device) -> None:
    """A cache made inside goes on outside; a chunk fills there, the first of its sequence."""
    model, ids = tiny(device), tokens(1, 35).to(device)
    with surgery.operated(model, dataclasses.replace(CONFIG, backend="triton")), torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = surgery.paged_cache(model)
        with torch.inference_mode():
            model(ids[:, :30], **{CACHE_NAME: cache})
            got = [model(ids[:, 30:31], **{CACHE_NAME: cache}).logits]
        got.append(model(ids[:, 31:32], **{CACHE_NAME: cache}).logits)
        steps = GraphedSteps(model, cache)
        got += [steps.step(ids[:, at : at + 1]).clone() for at in range(32, 35)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-4)

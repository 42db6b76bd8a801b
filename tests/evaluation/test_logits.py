import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen3Config,
)

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.evaluation import logits as logits_module
from llama_surgery.evaluation.logits import Head, final_states
from llama_surgery.evaluation.perplexity import (
    Divergence,
    Perplexity,
    perplexity,
    token_divergence,
    token_nll,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    # A cap that is far below the logits it is applied to.
    "capped": lambda: Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "divided": lambda: GraniteConfig(**SIZES, logits_scaling=7.0),
    "multiplied": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions a block, so that 50 positions are several blocks and a remainder."""
    monkeypatch.setattr(logits_module, "BLOCK_ELEMENTS", 7 * SIZES["vocab_size"])


def windows(count: int = 3, length: int = 50) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (count, length), generator=torch.manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_the_models_own_logits(name: str) -> None:
    model, ids = build(name), windows(1)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0].float()
    states, last = final_states(model, ids)
    parts = list(Head(model, ids).blocks(states))
    assert [part for part, _ in parts] == [slice(s, min(s + 7, 50)) for s in range(0, 50, 7)]
    torch.testing.assert_close(torch.cat([block for _, (block,) in parts]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_passes_the_check(name: str) -> None:
    model, ids = build(name, torch.bfloat16), windows(1)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0].float()
    (_, (block,)), *_ = Head(model, ids).blocks(final_states(model, ids)[0])
    assert block.dtype == torch.float32
    assert (block - expected).norm() <= 0.02 * expected.norm()


def test_float64_stays_float64() -> None:
    model, ids = build("llama", torch.float64), windows(1)[0]
    (_, (block,)), *_ = Head(model, ids).blocks(final_states(model, ids)[0])
    with torch.no_grad():
        torch.testing.assert_close(block, model(ids[None]).logits[0], rtol=1e-12, atol=1e-12)


def test_nothing_stays_hooked() -> None:
    model, ids = build("llama"), windows(1)[0]
    final_states(model, ids)
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        final_states(model, ids)
    assert not model.model._forward_hooks


def test_logits_made_in_another_way_are_refused() -> None:
    model = build("llama")
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits**2))
    with pytest.raises(UnsupportedModelError, match="differ by"):
        Head(model, windows(1)[0])


def test_model_without_an_output_projection_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output projection"):
        Head(LlamaModel(LlamaConfig(**SIZES)).eval(), windows(1)[0])


def test_model_that_is_not_finite_is_refused() -> None:
    model = build("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(SurgeryError, match="not finite"):
        Head(model, windows(1)[0])


def test_loss_that_is_not_finite_names_the_position() -> None:
    model, ids = build("llama"), windows(1, 90)[0]
    states, _ = final_states(model, ids)
    states[80] = torch.nan
    with pytest.raises(SurgeryError, match=r"position 81 of 90, model in torch\.float32"):
        token_nll(Head(model, ids), states, ids)


def full_nll(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids).logits.double()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.usefixtures("small_blocks")
def test_perplexity_is_that_of_the_full_logits() -> None:
    model, ids = build("llama"), windows()
    told: list[tuple[str, int, int]] = []
    measured = perplexity(model, ids, lambda *step: told.append(step))
    expected = full_nll(model, ids)
    torch.testing.assert_close(measured.nll, expected, rtol=1e-4, atol=1e-4)
    assert measured.value == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert measured.per_window == pytest.approx(expected.mean(dim=1).tolist(), rel=1e-5)
    assert len(measured.seconds) == 3
    assert told == [("perplexity", done, 3) for done in (1, 2, 3)]


def test_perplexity_of_a_model_wrapped_by_peft() -> None:
    plain, ids = build("llama"), windows()
    wrapped = get_peft_model(
        copy.deepcopy(plain), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    measured = perplexity(wrapped, ids)
    torch.testing.assert_close(measured.nll, full_nll(wrapped, ids), rtol=1e-4, atol=1e-4)
    assert measured.value != perplexity(plain, ids).value


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (2, [(1, 2)]),
        (256, [(1, 256)]),
        (257, [(1, 256), (256, 257)]),
        (1200, [(1, 256), (256, 512), (512, 1024), (1024, 1200)]),
    ],
)
def test_positions_are_binned_by_doubling(length: int, edges: list[tuple[int, int]]) -> None:
    # The loss of the token at position p is p / 1000.
    nll = torch.arange(1, length, dtype=torch.float64)[None].expand(2, -1) / 1000
    bins = Perplexity(nll, [0.0, 0.0]).by_position()
    assert [(b["from"], b["to"]) for b in bins] == edges
    assert [b["tokens"] for b in bins] == [2 * (stop - start) for start, stop in edges]
    for b in bins:
        mean = torch.tensor((b["from"] + b["to"] - 1) / 2000, dtype=torch.float64)
        assert b["perplexity"] == pytest.approx(mean.exp().item())


@pytest.mark.usefixtures("small_blocks")
def test_divergence_is_that_of_the_full_logits() -> None:
    model, ids = build("capped"), windows(1)[0]
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    head = Head(model, ids)
    dense, changed = final_states(model, ids)[0], final_states(other, ids)[0]
    kl, agree = token_divergence(head, dense, changed)
    with torch.no_grad():
        p, q = (m(ids[None]).logits[0].double().log_softmax(-1) for m in (model, other))
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(agree, p.argmax(-1) == q.argmax(-1))
    assert kl.shape == agree.shape == (50,)

    same, always = token_divergence(head, dense, dense)
    summary = Divergence(same[None], always[None])
    assert summary.mean_kl == pytest.approx(0.0, abs=1e-7)
    assert summary.top1 == 1.0

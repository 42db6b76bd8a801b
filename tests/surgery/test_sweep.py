"""Every causal language model of transformers: right when operated, in every way of calling, or refused.

The models that most people run are here by default, all others with ``--sweep`` (``make sweep``).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.surgery.families import MODEL_TYPES, VARIANTS, Exact, build
from tests.surgery.tiny import in_pieces, pad, tokens
from transformers import PreTrainedModel

from llama_surgery import (
    SurgeryConfig,
    UnsupportedModelError,
    config_of,
    is_operated,
    load_adapter,
    operate,
    operated,
    save_adapter,
    statistics,
)
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.head_budgets import head_budgets
from llama_surgery.surgery.operation import routers_of

#: Cuts are at multiples of the tile, in the shorter row too, whose padding is on the left.
LENGTH, SHORTER, PROMPT, NEW = 120, 104, 117, 4
OPEN = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.0, backend="gather")
SPARSE = dataclasses.replace(OPEN, theta=0.12, theta_decode=0.12)
REFERENCE = dataclasses.replace(SPARSE, backend="reference")

#: Norms and softmax included, everything is computed in float64; what differs is the order of sums.
EQUAL = 1e-11

#: Those that people run.
COMMON = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "granite", "olmo2"),
    *("cohere", "glm4", "qwen3_moe"),
)

#: Whose heads are not what a configuration counts, beside some whose are.
SHAPES = ("llama", "gemma2", "gpt_oss", "jetmoe", "deepseek_v3")

NO_INTERFACE = "does not use transformers' attention interface"
CROSS = "has cross-attention beside the self-attention of its layers"
INDEXED = "indexed_attention (sparse by a rule of their own)"
HYBRID = "hybrid (attention and a state-space mixer or convolution in one layer"
APART = "its attention belongs to parts configured apart"
SHARED_KEYS = "shares keys between layers"
SHARED_MODULE = "layers share one attention module"
LOOPED = "runs its layers several times for a token"
NOTHING = "it has no attention at all"
ALL_SLIDING = "sliding_attention (a sliding window)"

#: What is refused, and a part of the reason that must be given.
REFUSED = {
    **dict.fromkeys(("bloom", "mpt", "falcon with ALiBi"), "uses ALiBi"),
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen"), CROSS),
    **dict.fromkeys(("bigbird_pegasus", "pegasus", "plbart", "whisper"), CROSS),
    **dict.fromkeys((name for name in VARIANTS if name.endswith("with cross-attention")), CROSS),
    **dict.fromkeys(("big_bird", "cpmant", "falcon", "git", "gpt_neo", "gpt_neox_japanese"), NO_INTERFACE),
    **dict.fromkeys(
        ("megatron-bert", "mvp", "openai-gpt", "prophetnet", "reformer", "rembert"), NO_INTERFACE
    ),
    **dict.fromkeys(("roformer", "rwkv", "trocr", "xglm", "xlm", "xlnet"), NO_INTERFACE),
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"), INDEXED
    ),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), INDEXED),
    "deepseek_v4": "compressed_sparse_attention (sparse by a rule of their own)",
    "minimax_m3_vl_text with sparse layers": "minimax_m3_sparse (sparse by a rule of their own) beside",
    **dict.fromkeys(("falcon_h1", "inkling_text", "inkling2_text", "inkling2_loop_text", "zaya"), HYBRID),
    **dict.fromkeys(("zamba", "zamba2"), SHARED_MODULE),
    **dict.fromkeys(("dory", "hrm_text"), LOOPED),
    **dict.fromkeys(("gemma3n_text", "gemma4_assistant", "gemma4_unified_assistant"), SHARED_KEYS),
    "blt": APART,
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2", "xlstm", "granitemoehybrid without attention"), NOTHING
    ),
    **dict.fromkeys(("moshi", "mistral, all layers sliding", "phi3, all layers sliding"), ALL_SLIDING),
    "recurrent_gemma": ALL_SLIDING,
    "bert as an encoder": "has bidirectional attention",
    "diffllama": "calls its attention function twice",
    "doge": "makes its attention mask itself",
    "minimax": "takes no cache but one of its own (MiniMaxCache)",
}

#: Whose own generate() takes no padded prompts.
NO_PADDED_PROMPTS = {"musicgen_melody_decoder"}

#: What cannot be built here, and why.
NOT_BUILT = {"gemma3n": "its vision tower comes from timm"}

EVERYTHING = [
    pytest.param(name, marks=() if name in COMMON else pytest.mark.sweep)
    for name in (*MODEL_TYPES, *VARIANTS)
    if name not in NOT_BUILT
]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with Exact():
        yield


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_operated_model_is_right_in_every_way_of_calling_or_refused_with_the_reason(name: str) -> None:
    model = build(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError) as refusal:
            operate(model, OPEN)
        assert REFUSED[name] in str(refusal.value)
        assert not is_operated(model)
        return
    dense = dict(_answers(model))
    with operated(model, OPEN):
        _assert_equal(dict(_answers(model)), dense)
        for call, logits in _answers(_twin(model)):  # one by one: what is wrong in one may fail in the next
            _assert_equal({call: logits}, dense)
    with operated(model, SPARSE):
        sparse = dict(_answers(model))
        read = statistics(model)
        switched = _with_gradients_at_first(model)
    assert all(0 < density < 0.9 for layer in read.by_layer.values() for density in layer["far_density"])
    # The few tokens that are written can come near, as means stand in for what they do not read; what is
    # equal is off by EQUAL at most.
    least = {call: 1e5 * EQUAL if "generate" in call else 1e-4 for call in dense}
    assert all(_off(sparse[call], dense[call]) > least[call] for call in dense)
    with operated(model, REFERENCE):
        _assert_equal(sparse, dict(_answers(model)))
    # Cuts and padding change nothing, unless they change the dense model: kernels of recurrent layers may.
    for call in ("forward with a cache", "forward in pieces", "padded: long"):
        if _off(dense[call], dense["forward"]) < EQUAL:
            _assert_equal({call: sparse[call]}, {call: sparse["forward"]})
    if _off(dense["padded: short"], dense["short"]) < EQUAL:
        _assert_equal({"padded: short": sparse["padded: short"]}, {"padded: short": sparse["short"]})
    _assert_equal({"gradients": switched}, {"gradients": sparse["forward in pieces and steps"]})
    _assert_equal(dict(_answers(model)), dense, 0.0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SHAPES else pytest.mark.sweep)
        for name in (*MODEL_TYPES, *VARIANTS)
        if name not in NOT_BUILT and name not in REFUSED
    ],
)
def test_metric_and_budgets_have_the_shape_of_the_keys_and_come_back_with_an_adapter(
    name: str, tmp_path: Path
) -> None:
    model, ids = build(name), tokens(1, LENGTH)
    with operated(model, SPARSE):
        metric = routers_of(model)
    budgets = head_budgets(model, ids, SPARSE, metric, 0.2)
    config = dataclasses.replace(SPARSE, theta=budgets.theta)
    with operated(model, config, routers=budgets.routers), torch.no_grad():
        sparse = model(ids, use_cache=False).logits
        save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    found = routers_of(model)
    assert config_of(model) == config and found.keys() == budgets.routers.keys()
    for index, router in budgets.routers.items():
        parts = found[index].tensors()
        assert parts.keys() == router.tensors().keys() >= {"offset"}
        assert all(torch.equal(parts[part], value) for part, value in router.tensors().items())
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, sparse)


def _answers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Logits of every way of calling, by its name."""
    ids, other = tokens(1, LENGTH), tokens(1, SHORTER, seed=1)
    with torch.no_grad():
        yield "forward", model(ids, use_cache=False).logits
        yield "forward with a cache", model(ids, use_cache=True).logits
        yield "short", model(other, use_cache=False).logits
    yield "forward in pieces", in_pieces(model, ids, [48, 96])[0]
    yield "forward in pieces and steps", in_pieces(model, ids, [40, *range(PROMPT, LENGTH)])[0]
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids[:, :PROMPT], max_new_tokens=NEW, **options)
    yield "generate", torch.stack(out.logits, 1)
    batch, mask = pad([ids[0], other[0]], [0, LENGTH - SHORTER], LENGTH)
    logits, _ = in_pieces(model, batch, [96], mask=mask)
    yield "padded: long", logits[:1]
    yield "padded: short", logits[1:, LENGTH - SHORTER :]
    if model.config.model_type in NO_PADDED_PROMPTS:
        return
    out = model.generate(batch, attention_mask=mask, max_new_tokens=NEW, **options)
    yield "padded: generate", torch.stack(out.logits, 1)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model of the operated one's configuration and weights."""
    twin = type(model)(model.config).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin.eval()


def _with_gradients_at_first(model: PreTrainedModel) -> torch.Tensor:
    """The call "forward in pieces and steps", the first piece recording gradients and the others not."""
    ids = tokens(1, LENGTH)
    out = model(ids[:, :40], use_cache=True)
    parts, cache = [out.logits.detach()], out[CACHE_NAME]
    with torch.no_grad():
        for start, stop in ((40, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))):
            parts.append(model(ids[:, start:stop], use_cache=True, **{CACHE_NAME: cache}).logits)
    return torch.cat(parts, 1)


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _assert_equal(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = EQUAL
) -> None:
    off = {call: _off(logits, expected[call]) for call, logits in got.items()}
    assert all(error <= within for error in off.values()), off

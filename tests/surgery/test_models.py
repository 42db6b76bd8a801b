"""Architectures: what is operated, θ = 0 against the dense model, decoding, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tests.surgery.tiny import (
    DENSE_LIMIT,
    SIZES,
    SPARSE,
    build,
    generation_cuts,
    in_pieces,
    logits,
    pad,
    positions,
    tokens,
)
from transformers import PreTrainedModel

from llama_surgery import (
    PagedCache,
    UnsupportedModelError,
    is_operated,
    operate,
    operated,
    statistics,
)
from llama_surgery.surgery.compat import CACHE_NAME

SLIDING, FULL = "sliding_attention", "full_attention"

#: name: (architecture, changes to the sizes, operated layers)
MODELS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4}, [0, 1]),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}, [0, 1]),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}, [0, 1]),
    "llama-head-64": ("Llama", {"head_dim": 64}, [0, 1]),
    "llama-head-80": ("Llama", {"head_dim": 80}, [0, 1]),
    "llama-head-96": ("Llama", {"head_dim": 96}, [0, 1]),
    "llama-head-128": ("Llama", {"head_dim": 128}, [0, 1]),
    "llama-head-256": ("Llama", {"head_dim": 256}, [0, 1]),
    "llama-bias": ("Llama", {"attention_bias": True}, [0, 1]),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, [0, 1]),
    "mistral": ("Mistral", {"sliding_window": None}, [0, 1]),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, [0, 1]),
    "qwen3": ("Qwen3", {}, [0, 1]),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 48,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 7,
        },
        [1],
    ),
    "gemma3": (
        "Gemma3",
        {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 48},
        [2],
    ),
    "gpt-oss": (
        "GptOss",
        {
            "layer_types": [SLIDING, FULL],
            "sliding_window": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        [1],
    ),
    "phi3": ("Phi3", {"sliding_window": None}, [0, 1]),
    # Hands its cache to the attention module under another name.
    "gpt-neox": ("GPTNeoX", {}, [0, 1]),
    # Takes a view of what the attention function returns.
    "jetmoe": ("JetMoe", {"num_local_experts": 2, "kv_channels": 16}, [0, 1]),
    # Its full-attention modules carry the window of their neighbours.
    "exaone4": ("Exaone4", {"layer_types": [FULL, SLIDING], "sliding_window": 48}, [0]),
    # Layers of another kind between the full-attention ones.
    "lfm2": ("Lfm2", {"layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False}, [1]),
}


def make(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    kind, changes, _ = MODELS[name]
    if name == "gemma3":
        changes = {**SIZES, **changes}
        config = transformers.Gemma3TextConfig(**changes)
        torch.manual_seed(0)
        model = transformers.Gemma3ForCausalLM(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0, 0.15)
        model.generation_config.eos_token_id = None
        model = model.to(dtype)
    else:
        # The grouped products of experts have no float64 kernel.
        model = build(kind, dtype=torch.float32 if name in ("gpt-oss", "jetmoe") else dtype, **changes)
    if name in ("gpt-oss", "gemma2"):
        attention = "eager"  # sinks and soft caps exist there alone
    model.set_attn_implementation(attention)
    return model


def tolerance(model: PreTrainedModel) -> float:
    """Norms and eager softmax round to float32 even in a float64 model."""
    return 1e-6 if model.dtype == torch.float64 else 2e-5


def assert_near(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (got - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_theta_zero_is_dense_and_only_full_attention_is_operated(name, attention):
    model = make(name, attention)
    ids = tokens(1, 230)
    with_eager = make(name, "eager")
    dense = logits(with_eager, ids, use_cache=False)
    with operated(model, DENSE_LIMIT):
        assert_near(logits(model, ids, use_cache=False), dense, tolerance(model))
        assert_near(logits(model, ids), dense, tolerance(model))
        pieces, cache = in_pieces(model, ids, [117, 229])
        assert_near(pieces, dense, tolerance(model))
        assert list(statistics(model).by_layer) == MODELS[name][2]
    assert type(cache) is PagedCache
    assert torch.equal(
        logits(model, ids, use_cache=False), logits(make(name, attention), ids, use_cache=False)
    )


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    # Soft-capped eager attention of transformers gives NaN for padded float64 rows, dense or not.
    model = make(name, dtype=torch.float32 if name == "gemma2" else torch.float64)
    rows, sides = [tokens(150), tokens(113, seed=1)], [0, 37]
    ids, mask = pad(rows, sides, 150)
    with operated(model, SPARSE):
        together = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        for b, (row, left) in enumerate(zip(rows, sides, strict=True)):
            assert_near(together[b, left:], logits(model, row)[0], tolerance(model))


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_stepping_by_hand_and_theta_zero_generates_as_dense(name):
    model = make(name)
    ids = tokens(1, 150)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    dense = model.generate(ids, **options)
    with operated(model, DENSE_LIMIT):
        limit = model.generate(ids, **options)
    assert_near(torch.stack(limit.logits), torch.stack(dense.logits), tolerance(model))
    assert torch.equal(limit.sequences, dense.sequences)
    with operated(model, dataclasses.replace(SPARSE, theta=0.4, theta_decode=0.3)):
        sparse = model.generate(ids, **options)
        assert type(sparse[CACHE_NAME]) is PagedCache
        steps, _ = in_pieces(model, sparse.sequences[:, :-1], generation_cuts(model, 150, 155))
    assert_near(torch.stack(sparse.logits, 1), steps[:, 149:], tolerance(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_configuration_thins_the_operated_layers_alone(name):
    model, ids = make(name), tokens(1, 300)
    dense = logits(model, ids)
    with operated(model, dataclasses.replace(SPARSE, theta=0.9, theta_decode=0.9)):
        sparse = logits(model, ids)
        read = statistics(model)
    assert (sparse - dense).abs().max() > 1e-3
    assert list(read.by_layer) == MODELS[name][2]
    kv_heads = 4 if name in ("gpt-neox", "jetmoe") else model.config.num_key_value_heads
    for layer in read.by_layer.values():
        assert len(layer["far_density"]) == len(layer["pages_read"]) == kv_heads
        assert all(0 < density < 0.3 for density in layer["far_density"])
        assert 0 < layer["near_density"] < 1


REFUSED: dict[str, tuple[Any, str]] = {
    "bloom": (
        lambda: build("Bloom", n_layer=1, n_head=2),
        "BloomForCausalLM uses ALiBi",
    ),
    "mpt": (lambda: build("Mpt", d_model=32, n_layers=1, n_heads=2), "MptForCausalLM uses ALiBi"),
    "falcon-alibi": (
        lambda: small("Falcon", alibi=True),
        "FalconForCausalLM uses ALiBi",
    ),
    "falcon-rotary": (lambda: small("Falcon"), "FalconForCausalLM does not use .*attention interface"),
    "mamba": (lambda: small("Mamba"), "MambaForCausalLM has no full-attention layer.*state-space"),
    "mistral-sliding": (
        lambda: build("Mistral", sliding_window=32),
        "MistralForCausalLM has no full-attention layer.*sliding",
    ),
    "phi3-sliding": (
        lambda: build("Phi3", sliding_window=32),
        "Phi3ForCausalLM has no full-attention layer.*sliding",
    ),
    "qwen2-sliding": (
        lambda: build("Qwen2", sliding_window=32, use_sliding_window=True, layer_types=[SLIDING] * 2),
        "Qwen2ForCausalLM has no full-attention layer.*sliding",
    ),
    "t5": (
        lambda: small("T5", "ForConditionalGeneration", d_model=32, num_layers=1, num_heads=2, d_kv=8),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "diffllama": (lambda: build("DiffLlama"), "DiffLlamaForCausalLM calls its attention function twice"),
    "doge": (lambda: build("Doge"), "DogeForCausalLM makes its attention mask itself"),
    "minimax": (
        lambda: build("MiniMax", num_local_experts=2),
        "MiniMaxForCausalLM takes no cache but one of its own",
    ),
    "falcon-h1": (lambda: build("FalconH1"), "FalconH1ForCausalLM has no full-attention layer.*hybrid"),
    "bert-cross": (
        lambda: small("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True),
        "BertLMHeadModel has cross-attention beside the self-attention.*crossattention",
    ),
    "bert": (lambda: small("Bert", "Model"), "BertModel has bidirectional attention"),
}


def small(kind: str, head: str = "ForCausalLM", **changes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, **changes}
    if kind in ("T5", "GPTJ"):
        sizes = {"vocab_size": 97, **changes}
    elif kind != "Mamba":
        sizes["num_attention_heads"] = 2
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**sizes)).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_operated_are_refused_by_name_and_left_alone(name):
    make_model, message = REFUSED[name]
    model = make_model()
    before, implementation = dict(model.__dict__), model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=message):
        operate(model, SPARSE)
    assert not is_operated(model)
    assert model.__dict__.keys() == before.keys()
    assert model.config._attn_implementation == implementation
    assert not model._forward_pre_hooks


def test_several_modules_of_one_layer_are_refused():
    model = build("Llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match="several attention modules for layer 0"):
        operate(model, SPARSE)


def test_what_is_not_a_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        operate(torch.nn.Linear(2, 2), SPARSE)


def test_an_unknown_attention_implementation_is_refused():
    model = build("Llama")
    model.config._attn_implementation_internal = "somebody_elses"
    with pytest.raises(UnsupportedModelError, match="attention implementation 'somebody_elses': supported"):
        operate(model, SPARSE)

"""A tiny random model of every causal-LM class of transformers, shrunk from its configuration's defaults."""

import dataclasses
from typing import Any

import torch
import transformers
from tests.surgery.tiny import VOCABULARY
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: All model types that transformers maps to a causal language model.
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


#: Sizes by the names that configurations give them; a configuration gets those that it has a value for.
SIZES: dict[str, Any] = {
    **_all("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    **_all("hidden_size d_model n_embd embedding_size emb_dim embedding_dim out_hidden_size", 64),
    **_all("word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size", 64),
    **_all("intermediate_size ffn_dim ffn_hidden_size dff dim_ff d_inner feed_forward_size", 64),
    **_all("decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp", 64),
    **_all("moe_intermediate_size expert_ffn_hidden_size dense_intermediate_size", 32),
    **_all("shared_expert_intermediate_size shared_experts_intermediate_size", 32),
    **_all("moe_shared_expert_intermediate_size router_hidden_size", 32),
    **_all("num_attention_heads n_head n_heads num_heads attention_heads", 4),
    **_all("decoder_attention_heads encoder_attention_heads swa_num_attention_heads linear_num_heads", 4),
    **_all("num_decoder_attention_heads num_encoder_attention_heads", 4),
    **_all("num_key_value_heads swa_num_key_value_heads num_kv_heads", 2),
    **_all("linear_num_key_heads linear_num_value_heads index_n_heads", 4),
    **_all("head_dim swa_head_dim dim_head kv_channels d_head v_head_dim qk_nope_head_dim", 16),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim", 16),
    **_all("qk_rope_head_dim rotary_dim", 8),
    **_all("kv_lora_rank q_lora_rank o_lora_rank hc_lowrank loop_gate_rank", 16),
    **_all("max_position_embeddings n_positions max_seq_len max_target_positions", 512),
    **_all("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
    **_all("num_experts_per_tok moe_topk moe_k", 2),
    **_all("topk_group n_group", 1),
    **_all("sliding_window sliding_window_size window_size attention_window_size", 24),
    **_all("chunk_size mamba_chunk_size attention_chunk_size keep_window_size local_attention", 32),
    **_all("index_topk index_block_size", 16),
    "attn_logit_softcapping": 3.0,  # few logits of a small model come near a larger one
    **_all("index_topk_blocks num_codebooks", 1),
}
#: Given where the configuration has the name at all: a default of None is not always worked out.
ALWAYS = {"head_dim", "num_key_value_heads"}
LAYER_COUNTS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
}
#: What a configuration says of each layer. A small model has a layer of each kind.
LAYER_KINDS = ("layer_types", "mlp_layer_types")
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

#: What the rule gets wrong for the configuration of a model type.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in (SLIDING, FULL)
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "musicgen_melody_decoder": {"pad_token_id": 0},
    "ministral": {"layer_types": [SLIDING, FULL]},
    "mistral": {"sliding_window": None},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 64)},
    "roc_bert": {"shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": [LINEAR, "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": [LINEAR, "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

#: Other models of a type, where one flag makes another architecture: type and changes by name.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert as an encoder": ("bert", {"is_decoder": False}),
    "bert with cross-attention": ("bert", {"add_cross_attention": True}),
    "camembert with cross-attention": ("camembert", {"add_cross_attention": True}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "gemma3n_text without shared keys": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "gpt2 with cross-attention": ("gpt2", {"add_cross_attention": True}),
    "gpt_bigcode with multi-head attention": ("gpt_bigcode", {"multi_query": False}),
    "gpt_bigcode with cross-attention": ("gpt_bigcode", {"multi_query": False, "add_cross_attention": True}),
    "granitemoehybrid without attention": ("granitemoehybrid", {"layer_types": [LINEAR] * 2}),
    "minimax_m3_vl_text with sparse layers": (
        "minimax_m3_vl_text",
        {"layer_types": [FULL, "minimax_m3_sparse"]},
    ),
    "mistral, all layers sliding": ("mistral", {"sliding_window": 24}),
    "phi3, all layers sliding": ("phi3", {"sliding_window": 24}),
    "roberta with cross-attention": ("roberta", {"add_cross_attention": True}),
}

#: Configurations that cannot be made from defaults: the part that is given, its type and its changes.
WHOLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4_assistant": (
        "text_config",
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    )
}
#: Model types whose configuration transformers' own mapping does not take apart: the part it belongs to.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def shrunk(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """A small configuration of class ``kind``: a layer of each kind it has by default, at least two."""
    default = kind()
    names = {field.name for field in dataclasses.fields(kind)}
    given = {n: default.__dict__.get(kind.attribute_map.get(n, n)) for n in names}
    sizes = {n: SIZES[n] for n in names & SIZES.keys() if given[n] is not None or n in ALWAYS}
    ids = {n: v for n, v in given.items() if n.endswith("_token_id") and isinstance(v, int)}
    sizes |= {n: SPECIAL_TOKENS.get(n, v % VOCABULARY) for n, v in ids.items()}
    kinds = {k: list(dict.fromkeys(given[k])) for k in LAYER_KINDS if given.get(k)}
    layers = max(2, *map(len, kinds.values()), 2)
    sizes |= dict.fromkeys(names & LAYER_COUNTS, layers)
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        sizes["num_key_value_heads"] = SIZES[
            "num_attention_heads"
        ]  # the heads of multi-head latent attention
    sizes |= {k: (distinct * layers)[:layers] for k, distinct in kinds.items()}
    if "is_decoder" in names:
        sizes["is_decoder"] = True
    sizes |= {k: shrunk(type(v)) for k, v in given.items() if isinstance(v, PretrainedConfig)}
    return kind(**{**sizes, **CHANGES.get(kind.model_type, {}), **changes})


class Exact(TorchFunctionMode):
    """Has model code that computes in float32 compute in float64: what is random is then not also rounded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def build(name: str) -> PreTrainedModel:
    """A float64 model of a type or variant, sharp enough to attend unevenly. It wants :class:`Exact`."""
    name, changes = VARIANTS.get(name, (name, {}))
    torch.manual_seed(0)
    with Exact():
        if name in WHOLES:
            key, part, of_part = WHOLES[name]
            config = CONFIG_MAPPING[name](**{key: shrunk(CONFIG_MAPPING[part], **of_part)})
        else:
            config = shrunk(CONFIG_MAPPING[name], **changes)
        if name in PARTS:
            config = getattr(config, PARTS[name])
            model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        model = model.double()
        if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
            model.set_attn_implementation(
                "eager"
            )  # in older transformers the only one that honours soft caps
        # The grouped products of experts have no float64 kernel.
        model.set_experts_implementation("eager")
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.15)
                elif "bias" in key or "sink" in key:
                    weight.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.decoder_start_token_id = 1
    return model.eval()

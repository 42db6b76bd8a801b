"""Which models and which configurations can be served. Imports neither the engine nor transformers."""

from typing import Any

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError, check_version

#: Architecture of the dense model → architecture of the exported one. The name is our own, so that a server
#: without the plugin knows no such model and stops.
FAMILIES = {
    "LlamaForCausalLM": "SurgeryLlamaForCausalLM",
    "MistralForCausalLM": "SurgeryMistralForCausalLM",
    "Qwen2ForCausalLM": "SurgeryQwen2ForCausalLM",
    "Qwen3ForCausalLM": "SurgeryQwen3ForCausalLM",
}
#: Key of ``config.json`` that holds the operation.
BLOCK = "surgery"
BLOCK_VERSION = 1
#: Tensors of learned corrections: this name, with the layer's index and the part's name.
ROUTER_TENSOR = "model.layers.{layer}.self_attn.router.{part}"


def exported_architecture(config: dict[str, Any], where: str) -> str:
    """Architecture name of the exported model, from the dense model's ``config.json``.

    Raises:
        UnsupportedModelError: It is exported already, or of another family.
    """
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture in FAMILIES.values():
        raise UnsupportedModelError(f"{where} is an exported model already: export the dense checkpoint.")
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{where}: architecture {architecture}. Served are {', '.join(FAMILIES)}."
        )
    return FAMILIES[architecture]


def check_servable(config: SurgeryConfig) -> None:
    """Raise SurgeryError where the topology needs something that the engine's plugin does not do."""
    if config.topology != "pages":
        raise SurgeryError(f"topology={config.topology!r}: not served. Use an adapter of topology='pages'.")
    if config.backend not in ("auto", "gather", "triton"):
        raise SurgeryError(
            f"backend={config.backend!r} does not serve. Use 'auto', 'gather' (plain PyTorch) or 'triton'."
        )


def check_cache_dtype(name: str, where: str) -> None:
    """
    Raises:
        SurgeryError: Keys and values would be quantised.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise SurgeryError(
            f"{where} {name}: quantised keys and values are not supported, since moments and order are made "
            "of the keys as stored. Use --kv-cache-dtype with bfloat16, float16 or float32."
        )


def read_block(block: Any) -> tuple[SurgeryConfig, dict[int, list[str]]]:
    """Configuration and the learned parts of every layer, from the ``surgery`` block of a ``config.json``.

    Raises:
        SurgeryError: The block is missing, damaged or of a newer release.
    """
    if not isinstance(block, dict) or not isinstance(block.get("config"), dict):
        raise SurgeryError(
            f"config.json has no whole {BLOCK!r} block: the folder is damaged. Export the model again."
        )
    check_version(f"{BLOCK} block of version", block.get("version"), BLOCK_VERSION)
    config = SurgeryConfig.from_dict(block["config"])
    check_servable(config)
    return config, {int(layer): list(parts) for layer, parts in block.get("routers", {}).items()}

"""Entry point of the engine's plugin group ``vllm.general_plugins``: runs in every process, may run twice."""

from llama_surgery.serving.families import FAMILIES
from llama_surgery.serving.vllm import compat

_ROOM = "llama_surgery.serving.vllm"


def register() -> None:
    """Make exported models known: their classes, their start-up checks and the attention backend.

    Nothing of the engine is replaced, and models of other architectures are served as before. On an engine of
    a release that was not tested nothing is registered: exported models then do not start, others do.
    """
    from vllm.logger import init_logger

    reason = compat.unsupported_version()
    if reason:
        init_logger("vllm.llama_surgery").error(
            "llama-surgery is not active, and exported models will not start. %s", reason
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from llama_surgery.serving.vllm.startup import StartUp

    register_backend(AttentionBackendEnum.CUSTOM, f"{_ROOM}.plain.PlainBackend")
    for name in FAMILIES.values():
        MODELS_CONFIG_MAP[name] = StartUp
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{_ROOM}.models:{name}")

"""Learned block-sparse attention for pre-trained decoders, after the fact and without weight changes."""

import importlib

TYPE_CHECKING = False  # the name that type checkers know; importing typing would take the longest here
if TYPE_CHECKING:
    from llama_surgery.config import SurgeryConfig
    from llama_surgery.errors import AdapterError, SurgeryError, TextError, UnsupportedModelError
    from llama_surgery.gumbel_config import GumbelConfig
    from llama_surgery.learning.learned import learn
    from llama_surgery.surgery.adapter import load_adapter, save_adapter
    from llama_surgery.surgery.cache import PagedCache
    from llama_surgery.surgery.operate import eject, operate, operated
    from llama_surgery.surgery.operation import (
        config_of,
        is_operated,
        measured_loss,
        paged_cache,
        reset_statistics,
        statistics,
    )
    from llama_surgery.surgery.statistics import Statistics
    from llama_surgery.surgery.steps import GraphedSteps

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "GraphedSteps",
    "GumbelConfig",
    "PagedCache",
    "Statistics",
    "SurgeryConfig",
    "SurgeryError",
    "TextError",
    "UnsupportedModelError",
    "config_of",
    "eject",
    "is_operated",
    "learn",
    "load_adapter",
    "measured_loss",
    "operate",
    "operated",
    "paged_cache",
    "reset_statistics",
    "save_adapter",
    "statistics",
]

#: Names loaded on first use, so that importing the package stays light.
_LAZY = {
    "GraphedSteps": "surgery.steps",
    "GumbelConfig": "gumbel_config",
    "PagedCache": "surgery.cache",
    "Statistics": "surgery.statistics",
    "learn": "learning.learned",
    "SurgeryConfig": "config",
    **dict.fromkeys(("AdapterError", "SurgeryError", "TextError", "UnsupportedModelError"), "errors"),
    **dict.fromkeys(("load_adapter", "save_adapter"), "surgery.adapter"),
    **dict.fromkeys(("eject", "operate", "operated"), "surgery.operate"),
    **dict.fromkeys(
        ("config_of", "is_operated", "measured_loss", "paged_cache", "reset_statistics", "statistics"),
        "surgery.operation",
    ),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__

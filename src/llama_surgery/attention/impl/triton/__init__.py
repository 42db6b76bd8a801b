"""Triton kernels for the pages topology: selection, near field and far pages, whole sequences at once.

Importing this package does not import triton; the first call does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.prefill import TiledResult


def attend(*args: Any, **kwargs: Any) -> "TiledResult":
    """See :func:`llama_surgery.attention.impl.triton.prefill.attend`."""
    from llama_surgery.attention.impl.triton import prefill

    return prefill.attend(*args, **kwargs)

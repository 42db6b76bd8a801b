"""Who executes calls of attention, and what the kernels keep of a layout where they do."""

import functools
import importlib
from collections.abc import Callable

import torch

from llama_surgery.attention import blocks
from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.layout import build_layout as plain_layout
from llama_surgery.topology.router import PageRouter

#: Where the ways to execute calls are, loaded when first asked for.
_IMPL = "llama_surgery.attention.impl."


def kernels_run(
    backend: str, device: torch.device, problem: Callable[[], str | None], what: str = "run this"
) -> tuple[bool, str]:
    """Do the kernels execute what a backend was asked for, and if not though they could be wanted, why.

    Args:
        backend: As configured.
        device: Of the tensors.
        problem: Why the kernels cannot, or None; asked where they are wanted.
        what: What they were asked to do, for the message.

    Raises:
        SurgeryError: They were asked for by name, and cannot.
    """
    # ``auto`` leaves them out too where Triton's interpreter could run them: it is for tests.
    if backend not in ("auto", "triton") or (backend == "auto" and device.type != "cuda"):
        return False, ""
    found = problem()
    if found is not None and backend == "triton":
        raise SurgeryError(f"backend='triton' cannot {what}: {found}.")
    return found is None, found or ""


def backend_name(
    config: SurgeryConfig,
    queries: torch.Tensor,
    values: torch.Tensor,
    tile: int,
    *,
    learning: bool = False,
) -> str:
    """Who executes a call: the backend asked for, or the fastest that can.

    Args:
        config: Names the backend, or leaves it to this function.
        queries: (..., head_dim), for their device, dtype and gradient.
        values: (..., value_dim).
        tile: Queries of a tile.
        learning: Gradients by learned corrections are asked for.

    Raises:
        SurgeryError: The backend asked for by name cannot run this call.
    """

    def problem() -> str | None:
        from llama_surgery.attention.impl import triton

        found = triton.obstacle(config, queries, values, tile)
        if found is None and learning:
            found = "it has no gradients by learned corrections: use backend='auto' or 'gather'"
        return found

    if kernels_run(config.backend, queries.device, problem)[0]:
        return "triton"
    return "gather" if config.backend == "auto" else config.backend


def check_config(config: SurgeryConfig, head_dim: int) -> None:
    """Raise SurgeryError where the backend asked for by name runs no heads like these, on any device."""

    def problem() -> str | None:
        from llama_surgery.attention.impl.triton import unfit

        return unfit(config, head_dim, head_dim, config.tile)

    kernels_run(config.backend, torch.device("cpu"), problem)


def resolve(
    config: SurgeryConfig,
    queries: torch.Tensor,
    values: torch.Tensor,
    tile: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    router: PageRouter | None = None,
) -> AttentionCall:
    """Decide how calls on states like these are executed.

    Args:
        queries: (..., head_dim), for their device and dtype.
        values: (..., value_dim).
        tile: Queries of a tile.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.
        router: Learned corrections, or None.

    Raises:
        SurgeryError: The backend asked for by name cannot run the call.
    """
    learning = router is not None and differentiable(*router.tensors().values())
    name = backend_name(config, queries, values, tile, learning=learning)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(config, name, tile, scale, softcap, router)


def executor_of(
    call: AttentionCall,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout | None,
    sink_logit: torch.Tensor | None,
) -> Callable[..., AttentionResult]:
    """What executes a call: ``f(queries, near_keys, near_values, layout, start=…, sink_logit=…)``.

    The tensors are asked whether gradients are recorded.
    """
    if call.executor != "triton":
        return functools.partial(blocks.attend, importlib.import_module(_IMPL + call.executor), call)
    far = () if layout is None else (layout.keys, layout.values)
    way = "backward" if differentiable(queries, keys, values, *far, sink_logit) else "prefill"
    return functools.partial(importlib.import_module(f"{_IMPL}triton.{way}.launch").attend, call)


def kernels_serve(config: SurgeryConfig, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Do the Triton kernels execute calls on these keys and values, and so score their pages?"""
    return backend_name(config, keys, values, config.tile) == "triton"


def build_layout(
    keys: torch.Tensor,
    values: torch.Tensor,
    config: SurgeryConfig,
    router: PageRouter | None = None,
    *,
    kernels: bool | None = None,
    into: Layout | None = None,
) -> Layout:
    """Lay out full chunks; see :func:`llama_surgery.topology.layout.build_layout`.

    Args:
        keys: (streams, chunks * chunk_size, head_dim).
        values: (streams, chunks * chunk_size, value_dim).
        router: Learned corrections, or None.
        kernels: :func:`kernels_serve`, where it is known.
        into: What the kernels write and return, see their ``build_layout``; new tensors where None.
    """
    if not (kernels_serve(config, keys, values) if kernels is None else kernels):
        return plain_layout(keys, values, config, router)
    way = "backward" if differentiable(keys, values) else "layout"
    room = {} if into is None else {"into": into}
    build = importlib.import_module(f"{_IMPL}triton.{way}.launch").build_layout
    return build(keys, values, config, router, **room)


def kernel_features(layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """What the Triton kernels score pages by: ``Layout.features``, made of moments where it was not kept."""
    from llama_surgery.attention.impl.triton.job import features_of

    return features_of(layout, dtype)


def kernel_moments(features: torch.Tensor, page_size: int) -> Moments:
    """Moments of pages back from :func:`kernel_features`, as exactly as those were kept."""
    from llama_surgery.attention.impl.triton.job import KeptMoments

    return KeptMoments(features, page_size)

"""The dense side of a comparison: every way PyTorch's SDPA can compute a call, and the fastest of them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llama_surgery.errors import SurgeryError

from .measure import capture, say, times

#: Largest relative error of half precision that counts as right.
TOLERANCE = 0.02

GPU_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Way(NamedTuple):
    """A way to compute dense attention.

    Attributes:
        name: Shown beside the time.
        backend: Of SDPA; None leaves it to PyTorch.
        packed: The heads of a group as rows, so that keys are read once: for single queries, without mask.
    """

    name: str
    backend: SDPBackend | None
    packed: bool = False

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Causal attention of the last rows.

        Args:
            query: (batch, heads, rows, head_dim): one row, or as many as there are keys.
            keys: (batch, kv_heads, n, head_dim).
            values: (batch, kv_heads, n, value_dim).
            scale: Of q·k.

        Returns:
            (batch, heads, rows, value_dim).
        """
        call = functools.partial(sdpa, scale=scale)
        if self.backend is None:
            return call(query, keys, values, is_causal=query.shape[2] > 1, enable_gqa=True)
        with sdpa_kernel(self.backend):
            if self.packed:
                rows = query.squeeze(2).unflatten(1, (keys.shape[1], -1))
                return call(rows, keys, values).flatten(1, 2).unsqueeze(2)
            return call(query, keys, values, is_causal=query.shape[2] > 1, enable_gqa=True)


def ways(device: torch.device, rows: int) -> Iterator[Way]:
    """All ways to try for calls of ``rows`` queries."""
    if device.type != "cuda":
        yield Way("PyTorch's choice", None)
        return
    for name, backend in GPU_BACKENDS.items():
        yield Way(name, backend)
        if rows == 1:
            yield Way(f"{name}, heads as rows", backend, True)


def check(way: Way, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Compare some rows of the last head with float32.

    Raises:
        SurgeryError: The answer is wrong.
    """
    got = way(query, keys, values)[:, -1, -8:].float()
    q, k, v = query[:, -1, -8:].float(), keys[:, -1].float(), values[:, -1].float()
    logits = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device)
    hidden = hidden.triu_(1 + k.shape[1] - q.shape[1])
    exact = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    error = float((got - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise SurgeryError(f"{way.name}: relative error {error:.2e} of dense attention.")


def fastest(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[Way, dict[str, float]]:
    """The fastest way for such a call, and the milliseconds of each that runs, after a check of each.

    Single queries are timed as graph replays, longer calls as they are.
    """
    found: dict[Way, float] = {}
    for way in ways(query.device, query.shape[2]):
        try:
            check(way, query, keys, values)
            run: Callable[[], Any] = functools.partial(way, query, keys, values)
            if query.is_cuda and query.shape[2] == 1:
                run, _ = capture(run)
            found[way] = times(run, query.device, 10 if query.shape[2] == 1 else 2)[0]
        except (RuntimeError, SurgeryError) as problem:  # one that does not run must not end the program
            say(f"{way.name} is out: {str(problem).splitlines()[0][:160]}")
            continue
        say(f"dense, {query.shape[2]} rows of {keys.shape[2]}, {way.name}: {found[way]:.3f} ms")
    if not found:
        raise SurgeryError("no backend of PyTorch's SDPA runs dense attention here: nothing to compare with.")
    best = min(found, key=lambda way: found[way])
    return best, {way.name: ms for way, ms in found.items()}

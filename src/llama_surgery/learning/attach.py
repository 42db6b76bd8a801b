"""Running a model through soft gates, or beside them: the attention function of learning."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.learning import kernel_gates
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.gates import Homotopy, Rows, gated_rows
from llama_surgery.learning.reading import Reading
from llama_surgery.learning.soft_tree import pages_of
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.operation import is_operated
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules, inner_model
from llama_surgery.topology.geometry import query_blocks
from llama_surgery.topology.router import PageRouter

#: ``dense``: the model as it is. ``gated``: every layer through its gates.
Mode = Literal["dense", "gated"]


@dataclasses.dataclass
class Gates:
    """The state that the attention function reads, set anew for every pass.

    Attributes:
        corrections: Parameters by layer.
        config: Geometry.
        log_theta: Global log θ.
        homotopy: λ and τ.
        mode: What the pass does.
        sampled_tiles: Tiles of each block whose rows :func:`local_error` compares.
        generator: Chooses those tiles.
        reading: What the pass gathers.
    """

    corrections: Corrections
    config: SurgeryConfig
    log_theta: float
    homotopy: Homotopy = dataclasses.field(default_factory=lambda: Homotopy(1.0, 1.0))
    mode: Mode = "dense"
    sampled_tiles: int = 4
    generator: torch.Generator | None = None
    reading: Reading = dataclasses.field(default_factory=Reading)


@contextlib.contextmanager
def gates_in(model: torch.nn.Module, gates: Gates) -> Iterator[None]:
    """Let the attention of ``model`` follow ``gates`` for the length of a ``with`` block.

    Raises:
        SurgeryError: The model is operated.
        UnsupportedModelError: Its logits are capped or it has attention sinks.
    """
    inner = inner_model(model)
    if is_operated(model):
        raise SurgeryError("the model is operated: eject(model) before learning.")
    modules = attention_modules(inner)
    with attention_replaced(inner, modules.values(), functools.partial(_attention, gates)):
        yield


def _attention(
    gates: Gates,
    base: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    if gates.mode == "dense":
        return dense_attention(base, module, query, key, value, attention_mask, **keywords)
    refuse_unlearnable(module, query, key, attention_mask, keywords)
    scale = keywords.get("scaling") or query.shape[-1] ** -0.5
    router = gates.corrections[str(module.layer_idx)].router()
    return gated_layer(query, key, value, router, gates, scale).transpose(1, 2), None


def refuse_unlearnable(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, keywords: dict[str, Any]
) -> None:
    """
    Raises:
        SurgeryError: The call is not of a whole window.
        UnsupportedModelError: Attention is of a kind that gates do not know.
    """
    if mask is not None or key.shape[2] != query.shape[2]:
        raise SurgeryError("learning takes whole windows without padding and without a cache.")
    if keywords.get("softcap") is not None or keywords.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} caps its logits or has attention sinks: learning does not support it."
        )


def gated_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    router: PageRouter,
    gates: Gates,
    scale: float,
) -> torch.Tensor:
    """All rows of a layer through its gates.

    Args:
        query: (batch, heads, n, head_dim), n a multiple of the tile.
        key: (batch, kv_heads, n, head_dim).
        value: (batch, kv_heads, n, value_dim).

    Returns:
        (batch, heads, n, value_dim), the queries' dtype. Pairs are added to ``gates.reading``.
    """
    streams = key.shape[:2].numel()
    states = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    if kernel_gates.serves(*states[1:], router, gates.config):
        _check_tiles(query.shape[2], gates.config)
        corrections = router.for_streams(streams, query.device)
        found = gates.log_theta, gates.homotopy, gates.config, scale
        out, readings = kernel_gates.gated_window(*states, corrections, *found)
        for gated in readings:
            gates.reading.add(gated, 1.0)
        gates.reading.include_causal(streams, query.shape[2])
    else:
        layer = _Layer.of(query, key, value, router, gates)
        blocks = query_blocks(0, query.shape[2], gates.config, gates.config.tile)
        rows = [Rows(torch.arange(b.start, b.stop, device=query.device), b.closed, b.stop) for b in blocks]
        out = torch.cat([layer.run(block, gates, scale) for block in rows], 2)
        gates.reading.include_causal(streams, query.shape[2])
    return out.unflatten(0, (query.shape[0], -1)).flatten(1, 2).to(query.dtype)


def _check_tiles(n: int, config: SurgeryConfig) -> None:
    if n % config.tile:
        raise SurgeryError(f"{n} tokens are not whole tiles of {config.tile}: choose a multiple.")


def local_error(
    projection: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense: torch.Tensor,
    router: PageRouter,
    gates: Gates,
    scale: float,
) -> torch.Tensor:
    """Mean squared error of the layer's projected output over sampled tiles.

    Densities are estimated from the sampled tiles of each block and added to ``gates.reading``.

    Args:
        projection: (hidden, heads * value_dim) weight of the output projection; None to compare unprojected.
        query: (batch, heads, n, head_dim).
        key: (batch, kv_heads, n, head_dim).
        value: (batch, kv_heads, n, value_dim).
        dense: (batch, n, heads, value_dim), the dense layer's output.
        router: The layer's corrections, with gradient.
        gates: θ, homotopy, geometry and the generator that chooses tiles.
        scale: Scaling of q·k.
    """
    layer = _Layer.of(query.detach(), key.detach(), value.detach(), router, gates)
    tile, square, count = gates.config.tile, dense.new_zeros((), dtype=torch.float32), 0
    for block in query_blocks(0, query.shape[2], gates.config, tile):
        if not block.closed:
            continue
        tiles = (block.stop - block.start) // tile
        chosen = torch.randperm(tiles, generator=gates.generator)[: gates.sampled_tiles].sort().values
        offsets = (chosen[:, None] * tile + torch.arange(tile)).flatten()
        position = (block.start + offsets).to(query.device)
        rows = Rows(position, block.closed, block.stop)
        out = layer.run(rows, gates, scale, weight=tiles / len(chosen))
        out = (
            out.unflatten(0, (query.shape[0], -1)).flatten(1, 2).transpose(1, 2)
        )  # (batch, rows, heads, dim)
        change = (out - dense[:, position].to(out.dtype)).flatten(2)
        if projection is not None:
            change = change @ projection.to(change.dtype).T
        square = square + change.float().square().sum()
        count += change.shape[0] * change.shape[1]
    gates.reading.include_causal(layer.queries.shape[0], query.shape[2])
    return square / max(1, count)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer's states by stream, in at least float32, and its pages."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tree: Any
    router: PageRouter

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, router: PageRouter, gates: Gates
    ) -> "_Layer":
        batch, kv_heads, n, _ = key.shape
        config = gates.config
        _check_tiles(n, config)
        dtype = torch.promote_types(query.dtype, torch.float32)
        queries = query.to(dtype).unflatten(1, (kv_heads, -1)).flatten(0, 1)
        keys, values = key.to(dtype).flatten(0, 1), value.to(dtype).flatten(0, 1)
        router = router.for_streams(batch * kv_heads, query.device)
        full = n // config.chunk_size * config.chunk_size
        tree = None
        if full:
            chunked = keys[:, :full].detach().unflatten(1, (-1, config.chunk_size))
            tree = pages_of(keys[:, :full], router.map_keys(chunked), config)
        return cls(queries, keys, values, tree, router)

    def run(self, rows: Rows, gates: Gates, scale: float, weight: float = 1.0) -> torch.Tensor:
        """Rows through their gates, recomputed in the backward pass; pairs count ``weight`` times."""
        gated = checkpoint(
            gated_rows,
            self.queries[:, :, rows.position],
            self.keys,
            self.values,
            self.tree,
            self.router,
            rows,
            gates.log_theta,
            gates.homotopy,
            gates.config,
            scale,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random in it, and keeping a GPU's state waits for it
        )
        gates.reading.add(gated, weight)
        return gated.out

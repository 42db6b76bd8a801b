"""Do the arguments of a call of attention fit together?"""

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.router import PageRouter


def check_call(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout | None,
    config: SurgeryConfig,
    start: int,
    tile: int,
    sink_logit: torch.Tensor | None,
    router: PageRouter | None = None,
) -> None:
    """Raise SurgeryError where arguments of :func:`.api.attend` do not fit together."""
    if queries.dim() != 4 or keys.dim() != 3 or values.dim() != 3:
        raise SurgeryError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}: "
            "expected (streams, heads, rows, head_dim), (streams, keys, head_dim) and "
            "(streams, keys, value_dim)."
        )
    streams, heads, rows, dim = queries.shape
    if rows == 0:
        raise SurgeryError("queries have no rows: nothing to attend from.")
    if keys.shape[0] != streams or keys.shape[2] != dim or values.shape[:2] != keys.shape[:2]:
        raise SurgeryError(
            f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}: streams, keys and head_dim must agree."
        )
    if not queries.dtype == keys.dtype == values.dtype or not queries.is_floating_point():
        raise SurgeryError(
            f"dtypes {queries.dtype}, {keys.dtype}, {values.dtype}: queries, keys and values must "
            "share one floating dtype."
        )
    if not queries.device == keys.device == values.device:
        raise SurgeryError(
            f"devices {queries.device}, {keys.device}, {values.device}: move them to one device."
        )
    if tile not in (1, config.tile):
        raise SurgeryError(f"tile={tile}: must be 1 or the configured tile, {config.tile}.")
    if sink_logit is not None and sink_logit.shape != (streams, heads):
        raise SurgeryError(
            f"sink_logit {tuple(sink_logit.shape)}: expected (streams, heads) = {(streams, heads)}."
        )
    if router is not None:
        kv_heads = len(next(iter(router.tensors().values()), queries))
        router.check_shapes(kv_heads, heads, dim)
    near = start + rows - closed_chunks(start, config, tile) * config.chunk_size
    if keys.shape[1] < near:
        raise SurgeryError(
            f"{keys.shape[1]} near keys: rows from position {start} need the last {near} keys."
        )
    closed = closed_chunks(start + rows - 1, config, tile)
    if closed and (layout is None or layout.chunks < closed):
        have = 0 if layout is None else layout.chunks
        raise SurgeryError(f"the layout holds {have} chunks: the last row needs {closed}.")
    if layout is not None:
        _check_layout(layout, config, queries, values)


def _check_layout(layout: Layout, config: SurgeryConfig, queries: torch.Tensor, values: torch.Tensor) -> None:
    """Pages and orders are found at places that follow from the configuration."""
    streams, dim = queries.shape[0], queries.shape[-1]
    slots = layout.chunks * config.chunk_size
    fits = (
        layout.keys.shape == (streams, slots, dim)
        and layout.values.shape == (streams, slots, values.shape[-1])
        and layout.order.shape[::2] == (streams, config.chunk_size)
        and layout.moments.size == config.page_size
        and layout.moments.mean.shape == (streams, slots // config.page_size, dim)
    )
    means = layout.mean_values
    if config.summary != "none":
        summaries = (streams, layout.chunks * config.summaries_per_chunk, values.shape[-1])
        fits = fits and means is not None and means.shape == summaries
    if not fits:
        raise SurgeryError(
            f"a layout of {layout.chunks} chunks, keys {tuple(layout.keys.shape)}, values "
            f"{tuple(layout.values.shape)}, pages of {layout.moments.size}, mean values "
            f"{None if means is None else tuple(means.shape)}: it was not made for queries "
            f"{tuple(queries.shape)} with chunk_size={config.chunk_size}, page_size={config.page_size} and "
            f"summary={config.summary!r}."
        )
    for states in (layout.keys, layout.values):
        if states.dtype != queries.dtype or states.device != queries.device:
            raise SurgeryError(
                f"a layout of {states.dtype} on {states.device} for queries of {queries.dtype} on "
                f"{queries.device}: lay out keys and values of the queries' kind."
            )

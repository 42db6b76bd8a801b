"""Layout on a GPU: tree order, reordered keys and values, what is known of pages."""

import torch
import triton

from llama_surgery.attention.impl.triton import LARGEST_SQUARE, WIDEST_GRAM
from llama_surgery.attention.impl.triton.helpers import launching, pad_to_power
from llama_surgery.attention.impl.triton.layout.map_kernel import map_kernel
from llama_surgery.attention.impl.triton.layout.sort_kernels import (
    arrange_kernel,
    project_kernel,
    split_kernel,
)
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import Layout, Moments, check_chunks
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.tree import POWER_STEPS

#: Keys that are held at once.
BLOCK = 64

#: Bytes that a key's channel takes in all keys that are mapped at once.
MAPPED = 128

#: Warps of a program that projects the keys of a node of more than BLOCK keys, and of any other.
PROJECT_WARPS = (4, 1)

#: Keys that a warp arranges: more warps to a small page would wait for one another.
ARRANGED = 16


def build_layout(
    keys: torch.Tensor,
    values: torch.Tensor,
    config: SurgeryConfig,
    router: PageRouter | None = None,
    into: Layout | None = None,
) -> Layout:
    """Lay out full chunks; see :func:`llama_surgery.topology.layout.build_layout`, which it equals.

    Orders may differ from it where projections tie to rounding. A chunk's layout depends on that chunk
    alone, and nothing is read back to the host. Features and mean values are in the keys' and values' dtype.

    Args:
        keys: (streams, n * chunk_size, head_dim), float32, float16 or bfloat16.
        values: (streams, n * chunk_size, value_dim).
        router: Learned corrections, one for every KV head, or None.
        into: What is written and returned, rows contiguous, keys and values elsewhere than those given; its
            moments are not. New tensors where None.

    Raises:
        SurgeryError: Keys and values of another shape, or on different devices.
    """
    check_chunks(keys, values, config)
    streams, slots, dim = keys.shape
    value_dim = values.shape[-1]
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys.detach(), values))
    with launching(keys):
        order = _order(keys, config, router)
        page_pad = triton.next_power_of_2(config.page_size)
        pages = max(1, ARRANGED // page_pad)
        made = into or _empty(keys, values, config)
        assert made.features is not None
        means, new = made.mean_values, into is None
        arrange_kernel[(triton.cdiv(slots // config.page_size, pages), streams)](
            keys,
            values,
            order,
            made.keys,
            made.values,
            made.order,
            made.moments.mean if new else None,
            made.moments.variance if new else None,
            made.features,
            means,
            made.sink_page,
            *keys.stride()[:2],
            *values.stride()[:2],
            made.keys.stride(0),
            made.values.stride(0),
            made.order.stride(0),
            made.features.stride(0),
            0 if means is None else means.stride(0),
            slots,
            LARGEST_SQUARE,
            CHUNK=config.chunk_size,
            PAGE=config.page_size,
            PAGE_PAD=page_pad,
            PAGES=pages,
            DIM=dim,
            DIM_PAD=pad_to_power(dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=pad_to_power(value_dim),
            num_warps=min(4, max(1, page_pad // ARRANGED)),
        )
    return made


def _empty(keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig) -> Layout:
    """A layout to be written, its moments too."""
    (streams, slots, dim), value_dim, page = keys.shape, values.shape[-1], config.page_size
    mean, variance = (keys.new_empty(streams, slots // page, dim, dtype=torch.float32) for _ in range(2))
    summarised = config.summary != "none"
    return Layout(
        torch.empty_like(keys, memory_format=torch.contiguous_format),
        torch.empty_like(values, memory_format=torch.contiguous_format),
        keys.new_empty(streams, slots // config.chunk_size, config.chunk_size, dtype=torch.int16),
        Moments(mean, variance, page),
        keys.new_empty(streams, slots // page, 2 * dim),
        values.new_empty(streams, slots // page, value_dim) if summarised else None,
        keys.new_empty(streams, dtype=torch.int32),
    )


def _order(keys: torch.Tensor, config: SurgeryConfig, router: PageRouter | None) -> torch.Tensor:
    """Tree order of every chunk: (streams, slots) int32 offsets."""
    streams, slots, dim = keys.shape
    chunk, page = config.chunk_size, config.page_size
    offsets = torch.arange(chunk, dtype=torch.int32, device=keys.device)
    order = offsets.repeat(streams, slots // chunk)
    if page == chunk:
        return order
    keys = _mapped(keys, router)
    dim_pad = pad_to_power(dim)
    children, projections = torch.empty_like(order), torch.empty_like(order, dtype=torch.float32)
    node = chunk
    while node > page:
        node_pad = triton.next_power_of_2(node)
        held = BLOCK if dim_pad <= WIDEST_GRAM else node_pad
        project_kernel[(slots // node, streams)](
            keys,
            order,
            projections,
            *keys.stride()[:2],
            slots,
            CHUNK=chunk,
            NODE=node,
            BLOCK=max(16, min(held, node_pad)),
            DIM=dim,
            DIM_PAD=dim_pad,
            STEPS=POWER_STEPS,
            # Loads ahead would be wrong: for loads by way of ``order`` Triton (3.6, 3.9) keeps one
            # buffer, and fills it while Hopper's matrix units still read it.
            num_stages=1,
            num_warps=PROJECT_WARPS[0] if node > BLOCK else PROJECT_WARPS[1],
        )
        split_kernel[(slots // chunk, streams)](
            order, children, projections, slots, SIZE=node, NODES=chunk // node
        )
        order, children = children, order
        node //= 2
    return order


def _mapped(keys: torch.Tensor, router: PageRouter | None) -> torch.Tensor:
    """Keys as the tree is to see them, in their own dtype, so that splits go through the matrix units."""
    if router is not None and router.key_weight is not None:
        weight = router.key_weight.to(keys.device)
        if len(weight) != len(keys):
            weight = weight.repeat(len(keys) // max(1, len(weight)), 1)
        if weight.shape != (len(keys), keys.shape[-1]):
            raise SurgeryError(
                f"key_weight {tuple(router.key_weight.shape)} for keys {tuple(keys.shape)}: expected "
                f"(kv_heads, {keys.shape[-1]})."
            )
        # Rounded as it is written: a copy in the weights' precision would be many times the tensor.
        keys = torch.mul(keys, weight[:, None], out=torch.empty_like(keys))
    if router is None or router.key_map is None:
        return keys
    (streams, slots, dim), key_map = keys.shape, router.key_map.to(keys.device).contiguous()
    mapped = torch.empty_like(keys, memory_format=torch.contiguous_format)
    if key_map.shape[1:] != (dim, dim) or streams % len(key_map):
        raise SurgeryError(
            f"key_map {tuple(key_map.shape)} for keys {tuple(keys.shape)}: expected (kv_heads, {dim}, {dim})."
        )
    block = MAPPED // keys.element_size()
    map_kernel[(triton.cdiv(slots, block) * triton.cdiv(dim, block), streams)](
        keys,
        key_map,
        mapped,
        *keys.stride()[:2],
        slots,
        KV_HEADS=len(key_map),
        DIM=dim,
        DIM_PAD=pad_to_power(dim),
        ROWS=block,
        COLUMNS=block,
    )
    return mapped

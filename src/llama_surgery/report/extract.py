"""Reading what the report shows out of an operated model."""

from typing import Any

import torch

from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.report.tree import HeadTree
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import config_of, paged_cache
from llama_surgery.surgery.supported import inner_model


def head_tree(model: torch.nn.Module, tokenizer: Any, text: str, *, layer: int, kv_head: int) -> HeadTree:
    """Run an operated model over the first chunk of ``text`` and read one head's tree.

    Args:
        model: An operated model.
        text: At least ``chunk_size`` tokens.
        layer: An operated layer.
        kv_head: One of its KV heads.

    Raises:
        SurgeryError: The model is not operated, or there is no such layer or head.
        TextError: The text is shorter than a chunk.
    """
    config = config_of(model)
    inner = inner_model(model)
    ids, pieces = _tokens(tokenizer, text, config.chunk_size)
    if len(ids) < config.chunk_size:
        raise TextError(
            f"a text of {len(ids)} tokens: a tree is built over a full chunk of "
            f"{config.chunk_size}. Give a longer text."
        )
    cache = paged_cache(model)
    operated = {i: c for i, c in enumerate(cache.layers) if isinstance(c, PagedLayer)}
    if layer not in operated:
        raise SurgeryError(f"layer={layer} is not operated. Operated are {list(operated)}.")
    with torch.inference_mode():
        row = torch.tensor([ids], device=inner.device)
        inner(row, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    layout = operated[layer].stores[0].layout
    assert layout is not None  # a full chunk was read
    order = layout.order  # (kv_heads, chunks, chunk_size)
    if not 0 <= kv_head < order.shape[0]:
        raise SurgeryError(f"kv_head={kv_head}: layer {layer} has {order.shape[0]}.")
    return HeadTree(layer, kv_head, pieces, order[kv_head, 0].tolist(), config.page_size)


def _tokens(tokenizer: Any, text: str, count: int) -> tuple[list[int], list[str]]:
    """The first ``count`` tokens of ``text`` and what each of them covers of it."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:count]
        return ids, [tokenizer.decode([i]) for i in ids]
    coded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = coded["offset_mapping"][:count]
    pieces, end = [], 0
    for start, stop in spans:
        # A character of several byte tokens is written once, by the first of them.
        pieces.append(text[max(start, end) : stop])
        end = max(end, stop)
    return coded["input_ids"][:count], pieces

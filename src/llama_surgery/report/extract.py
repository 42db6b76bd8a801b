"""What the report shows beside an evaluation: a tree of an operated model, times of decode steps."""

import contextlib
import statistics
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.generation import timed_call
from llama_surgery.report.tree import HeadTree
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import config_of, paged_cache
from llama_surgery.surgery.progress import Progress
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows as cut_windows

#: Decode steps that are timed, after a few that are not.
STEPS, WARM_UP = 24, 4


def head_tree(model: torch.nn.Module, tokenizer: Any, text: str, *, layer: int, kv_head: int) -> HeadTree:
    """Run an operated model over the first chunk of ``text`` and read the tree of one head of a layer.

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
    layers = {i: c for i, c in enumerate(cache.layers) if isinstance(c, PagedLayer)}
    if layer not in layers:
        raise SurgeryError(f"layer={layer} is not operated. Operated are {list(layers)}.")
    with torch.inference_mode():
        row = torch.tensor([ids], device=inner.device)
        inner(row, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    layout = layers[layer].stores[0].layout
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


def besides(
    model: Any,
    tokenizer: Any,
    result: Any,
    configs: dict[str, SurgeryConfig],
    routers: dict[str, Any],
    texts: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """What a report shows beside an evaluation's ``result``: times of decode steps, and a head's tree.

    The times are left out where windows are too short for them, the tree where all texts are.
    """
    ids = cut_windows(tokenizer, texts, result.length, 1, result.seed)
    progress("decode times", 0, 1 + len(configs))
    enough = result.length > STEPS + WARM_UP
    decode, trees = {"dense": decode_ms(model, ids)} if enough else {}, []
    for number, (name, config) in enumerate(configs.items(), start=1):
        progress("decode times", number, 1 + len(configs))
        with operated(model, config, routers=routers.get(name)):
            if enough:
                decode[name] = decode_ms(model, ids)
            if number == 1 and config.topology == "pages":
                by_layer = result.operated[0].density["by_layer"].items()
                heads = ((d, at, head) for at, v in by_layer for head, d in enumerate(v["far_density"]))
                _, layer, head = max(heads)  # which reads most
                with contextlib.suppress(TextError):
                    tree = head_tree(model, tokenizer, max(texts, key=len), layer=layer, kv_head=head)
                    trees.append(tree.to_dict())
    progress("decode times", 1 + len(configs), 1 + len(configs))
    return {"decode_ms": decode, "trees": trees}


def decode_ms(model: Any, ids: torch.Tensor) -> float:
    """Median milliseconds of a decode step after ``ids`` (1, length)."""
    prompt, *steps = ids.to(model.device).split([ids.shape[1] - STEPS - WARM_UP, *[1] * (STEPS + WARM_UP)], 1)
    with torch.inference_mode():
        cache, _ = timed_call(model, prompt)
        times = [timed_call(model, step, cache)[1] for step in steps]
    return 1000 * statistics.median(times[WARM_UP:])

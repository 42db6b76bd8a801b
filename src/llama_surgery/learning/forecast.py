"""What operating on a model and learning for it will take, said before anything runs.

Everything here is counted from the model's configuration; nothing is measured. What a device multiplies in a
second is an argument.
"""

import dataclasses
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.learning.corrections import Corrections, Part
from llama_surgery.learning.weights import parts_of
from llama_surgery.surgery.supported import attention_modules, head_shape
from llama_surgery.topology.geometry import causal_pairs, first_far, near_pairs, summary_density

#: Multiplications that a step on logits takes for each of the forward pass, of weights and of attention: the
#: dense model's pass, the gated one's, that again while going back, and on the way back one product for each
#: with a frozen weight, two for attention's.
LOGITS_FACTORS = (4, 5)
#: Bytes of a correction while it is learned: itself, its gradient and Adam's two moments, in float32.
CORRECTION_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a model's configuration costs depend on.

    Attributes:
        parameters: Of the whole model.
        largest_part: Parameters of its largest part: a layer, or the embedding.
        hidden: Width of the residual stream.
        intermediate: Width inside a feed-forward block.
        layers: KV heads, query heads of a group and head_dim of every operated layer, by index.
        dtype_bytes: Of a weight.
    """

    parameters: int
    largest_part: int
    hidden: int
    intermediate: int
    layers: Mapping[int, tuple[int, int, int]]
    dtype_bytes: int


@dataclasses.dataclass(frozen=True)
class Length:
    """An operated text of one length.

    Attributes:
        length: Tokens.
        near_density: Near field over causal pairs, exact.
        far_density: Executed far pairs over causal pairs: what was asked for, or less where θ, set at the
            calibration length, leaves less.
        scoring: What pages are chosen by, in units of attention over all causal pairs: their scores, and the
            logits of the near field, which rows' totals need once more.
        summary: The same for the products with means of unseen pages.
        attention_speedup: Multiplications of dense attention over those of near field, far field, scoring
            and summary.
        model_speedup: The same for the whole model in prefill, with its projections.
        cache_bytes: Keys and values of one text.
        feature_bytes: What is kept of its pages beside: means and variances of keys, means of values.
    """

    length: int
    near_density: float
    far_density: float
    scoring: float
    summary: float
    attention_speedup: float
    model_speedup: float
    cache_bytes: int
    feature_bytes: int


@dataclasses.dataclass(frozen=True)
class Learning:
    """What learning takes.

    Attributes:
        corrections: Parameters learned.
        corrections_share: Of the model's.
        memory: Bytes at once where the model stays on disk, as if all of it were: the largest part and the
            windows that pass through it together, one window's states of a layer in float32, a strip of
            logits and what is made of it, and the corrections with their gradients and moments.
        states: Bytes on disk there: attention states of all windows.
        multiplications: Of all steps on logits, with the model in memory.
        seconds: Of those, at the given rate.
    """

    corrections: int
    corrections_share: float
    memory: int
    states: int
    multiplications: float
    seconds: float


def shape_of(model: PreTrainedModel) -> Shape:
    """What costs depend on; parameters may be on the meta device.

    Raises:
        UnsupportedModelError: The model cannot be operated.
    """
    text = model.config.get_text_config()
    dtype = getattr(text, "dtype", None) or torch.float32
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_part=max(sum(p.numel() for p in part.parameters()) for part in parts_of(model).values()),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers={index: head_shape(model, module) for index, module in attention_modules(model).items()},
        dtype_bytes=dtype.itemsize,
    )


def at_length(shape: Shape, config: SurgeryConfig, density: float, length: int) -> Length:
    """Costs of one text.

    The far density is taken as ``density`` at all lengths: θ falls with the position beyond the length it was
    set on (``theta_length``), and shorter texts read somewhat more of their closed chunks. A score takes
    1 / page_size of the score products of dense attention for means and as many for variances; each is half
    of what attention multiplies for a pair. Kernels make it once; for the few pages that may be opened once
    more, which is not counted.

    Args:
        density: Executed far density that θ is set for.
        length: Tokens of the text.
    """
    causal = causal_pairs(0, length)
    near = near_pairs(0, length, config, config.tile) / causal
    closed = 1 - near
    far = min(closed, density)
    scoring = closed / config.page_size
    sparse_from = min(length, first_far(config))
    scoring += near_pairs(sparse_from, length, config, config.tile) / causal / 2
    summary = summary_density(config, length)
    sparse = near + far + scoring + summary
    # Multiplications a token: two products of head_dim with every key for every query head, and all weights.
    dense = sum(2 * kv * group * dim for kv, group, dim in shape.layers.values()) * causal / length
    per_token = shape.parameters
    cache_bytes = sum(2 * kv * dim for kv, _, dim in shape.layers.values()) * length * shape.dtype_bytes
    kept = 2 + (config.summary == "page")  # of a page, over a key
    return Length(
        length=length,
        near_density=near,
        far_density=far,
        scoring=scoring,
        summary=summary,
        attention_speedup=1 / sparse,
        model_speedup=(per_token + dense) / (per_token + dense * sparse),
        cache_bytes=cache_bytes,
        feature_bytes=round(cache_bytes * kept / 2 / config.page_size),
    )


def learning_of(
    shape: Shape,
    config: SurgeryConfig,
    parts: tuple[Part, ...],
    *,
    length: int,
    windows: int,
    steps: int,
    sampled_tiles: int,
    together: int,
    multiplications_per_second: float,
) -> Learning:
    """Costs of learning.

    Args:
        parts: What is learned beside budgets.
        length: Tokens of a window.
        windows: Training windows whose states are kept on disk.
        steps: Steps, one window each.
        sampled_tiles: Tiles of each block whose rows are compared where the model stays on disk.
        together: Windows that pass through a layer while it is loaded.
        multiplications_per_second: Multiply-adds that the device makes.
    """
    corrections = sum(p.numel() for p in Corrections.build(shape.layers, parts, seed=0).parameters())
    queries = {i: kv * group * dim for i, (kv, group, dim) in shape.layers.items()}
    state = [2 * length * (kv * dim + queries[i]) for i, (kv, _, dim) in shape.layers.items()]
    rows = min(sampled_tiles * config.tile, config.chunk_size)
    heads = max(kv * group for kv, group, _ in shape.layers.values())
    memory = (
        shape.largest_part * shape.dtype_bytes
        + together * length * (4 * shape.hidden + 3 * shape.intermediate) * shape.dtype_bytes
        + max(state) * 4
        + rows * length * heads * 4 * 8
        + corrections * CORRECTION_BYTES
    )
    of_weights, of_attention = LOGITS_FACTORS
    attention = sum(2 * width for width in queries.values()) * length * (length + 1) / 2
    multiplications = steps * (of_weights * shape.parameters * length + of_attention * attention)
    return Learning(
        corrections=corrections,
        corrections_share=corrections / shape.parameters,
        memory=memory,
        states=windows * sum(state) * shape.dtype_bytes,
        multiplications=multiplications,
        seconds=multiplications / multiplications_per_second,
    )

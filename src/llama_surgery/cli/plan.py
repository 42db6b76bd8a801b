"""``llama-surgery plan``."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from llama_surgery.cli import options
from llama_surgery.cli.common import look_for
from llama_surgery.cli.console import out, print_json, status
from llama_surgery.cli.options import SHARE, STEPS, config_for, learned_parts, token_counts, topology_options
from llama_surgery.cli.tables import make_table

if TYPE_CHECKING:
    from llama_surgery.learning.forecast import Learning, Length, Shape
    from llama_surgery.learning.settings import LearningSettings

_learning = functools.partial(options.declared, "Learning")


@functools.partial(topology_options, runs=False)
def plan(
    *,
    model: options.Shape,
    density: options.of_topology(float, "Executed far density that θ is set for.", **SHARE) = 0.06,
    calibrated: options.of_topology(str, "Tokens of the windows that θ is set on.") = "8k",
    tile: options.Tile = 64,
    length: options.own(
        list[str] | None, "Tokens of a text, as 8192 or 8k. May be repeated, or several after commas."
    ) = None,
    part: _learning(
        list[str] | None, "What is learned beside budgets. As 'learn' has it, if left out."
    ) = None,
    windows: _learning(int, "Training windows of 'learn --stream'.", min=1) = 16,
    steps: _learning(int, "Steps.", min=1) = STEPS,
    tflops: _learning(float, "What the device is assumed to compute, in TFLOP/s.", min=0.001) = 100.0,
    json: options.Json = False,
    settings: dict[str, Any],
) -> None:
    """Say what operating on a model, and learning for it, will take, before anything runs.

    Density and speed-up at several lengths, in multiplications; the time of learning, and for a model that
    stays on disk ('learn --stream') memory and disk. All of it is counted from the
    configuration; what is assumed is printed. Example:

    llama-surgery plan demo/books-26m --length 8k,32k,128k
    """
    config = config_for(settings, tile)
    lengths = token_counts(length or ["8k", "32k", "128k"])
    window = token_counts([calibrated])[0]
    look_for(model)
    with status("Loading PyTorch and transformers …"):
        from llama_surgery.learning.forecast import at_length, learning_of, shape_of
        from llama_surgery.learning.settings import LearningSettings
        from llama_surgery.learning.streaming import TOGETHER
        from llama_surgery.learning.weights import skeleton
        from llama_surgery.surgery.context import check_length

    # Checks what is given; its sampling is what is counted.
    parts = learned_parts(part, config)
    learning = LearningSettings(density=density, length=window, steps=steps, parts=parts)
    bones = skeleton(model)
    check_length(bones, lengths[-1], read=False)
    shape = shape_of(bones)
    texts = [at_length(shape, config, density, tokens) for tokens in lengths]
    learned = learning_of(
        shape,
        config,
        learning.parts,
        length=window,
        windows=windows,
        steps=steps,
        sampled_tiles=learning.sampled_tiles,
        together=min(windows, TOGETHER),
        multiplications_per_second=tflops * 1e12 / 2,
    )
    if json:
        counted = {
            "texts": [dataclasses.asdict(text) for text in texts],
            "learning": dataclasses.asdict(learned),
        }
        print_json({"model": dataclasses.asdict(shape), "config": config.to_dict(), **counted})
        return
    _print(shape, texts, learned, learning, tflops)


def _print(
    shape: "Shape", texts: "list[Length]", learned: "Learning", asked: "LearningSettings", tflops: float
) -> None:
    rows = [
        (
            *(f"{text.length:,}", f"{text.near_density:.3f}", f"{text.far_density:.4f}"),
            *(f"{text.scoring:.4f}", f"{text.summary:.4f}", f"{text.attention_speedup:.1f}"),
            *(f"{text.model_speedup:.2f}", _bytes(text.cache_bytes)),
        )
        for text in texts
    ]
    columns = ("tokens", "near", "far", "scores", "summary", "attention ÷", "model ÷", "keys and values")
    title = f"A text of one sequence, {shape.parameters / 1e9:.3g} billion parameters"
    out.print(make_table(title, columns, rows))
    out.print(
        "Shares are of attention over all causal pairs. ÷: multiplications of the dense prefill over those "
        f"of the operated one, not measured time. Far density {asked.density:g} is taken to hold at every "
        f"length: beyond {asked.length:,} tokens, where θ is set, θ falls with the position. Every weight is "
        "taken to be used by every token (experts are not)."
    )
    out.print(
        f"\nlearn: {learned.corrections:,} corrections, {learned.corrections_share:.4%} of the model; "
        f"{asked.steps} steps of {asked.length:,} tokens, {2 * learned.multiplications / 1e15:.3g} PFLOP, "
        f"{_seconds(learned.seconds)} at {tflops:g} TFLOP/s, which is an assumption: give --tflops."
    )
    out.print(
        f"\nlearn --stream, the model on disk: memory {_bytes(learned.memory)}; "
        f"{_bytes(learned.states)} of attention states on disk."
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

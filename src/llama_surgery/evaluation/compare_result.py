"""A row of a comparison: quality against measured density, with intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llama_surgery.evaluation.compare_forms import Form
from llama_surgery.evaluation.intervals import mean_interval, paired_difference, perplexity_ratio
from llama_surgery.evaluation.needle import NeedlePrompt

#: Settings that every row repeats, so that a CSV stands alone.
_SHARED = (
    *("model", "length", "windows", "needles", "seed", "dtype", "tf32"),
    *("llama_surgery", "torch", "transformers"),
)


def row(
    form: Form,
    floor: float,
    target: float,
    cell: Mapping[str, Any],
    dense: Mapping[str, Any],
    prompts: Sequence[NeedlePrompt],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """One form at one density.

    Densities are measured on what was asked, summaries of unseen pages included: ``total_density`` over the
    perplexity windows, ``prefill_density`` and ``decode_density`` while the needles were answered.
    ``needle`` is over all prompts, ``needle_kept`` over those that the dense model answered, each with
    Wilson's 95% interval; ``needle_bound`` is the one-sided 95% lower bound of the paired difference to
    dense, in closed form, and ``needle_changed`` counts prompts that one of both answered alone.
    """
    setting, answers = cell["setting"], cell["answers"]
    ratio = perplexity_ratio(dense["per_window"], cell["per_window"], settings["seed"])
    paired = paired_difference(dense["answers"], answers)
    kept = [float(after) for before, after in zip(dense["answers"], answers, strict=True) if before]
    variants = dict.fromkeys(prompt.variant for prompt in prompts)
    return {
        "form": form.name,
        "title": form.title,
        "ahead": form.ahead,
        "floor": floor,
        "target_density": target,
        "total_density": cell["density"],
        "knob": setting.get("knob", "theta" if "theta" in setting else ""),
        "number": setting.get("number", setting.get("theta")),
        "perplexity": _perplexity(cell),
        "dense_perplexity": _perplexity(dense),
        "perplexity_ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        **_named("needle", mean_interval(answers)),
        **_named("needle_kept", mean_interval(kept) if kept else (None, None, None)),
        "dense_needle": paired.dense,
        "needle_difference": paired.difference,
        "needle_bound": paired.low,
        "needle_changed": paired.lost + paired.won,
        **{f"{phase}_density": value for phase, value in cell["answering"].items()},
        **{
            f"needle_{name}": statistics.fmean(
                right for right, prompt in zip(answers, prompts, strict=True) if prompt.variant == name
            )
            for name in variants
        },
        "seconds": cell["seconds"],
        "device": cell["device"],
        **{name: settings[name] for name in _SHARED},
    }


def _perplexity(cell: Mapping[str, Any]) -> float:
    return math.exp(statistics.fmean(cell["per_window"]))


def _named(name: str, interval: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))

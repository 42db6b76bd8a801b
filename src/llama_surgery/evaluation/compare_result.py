"""Finished cells of a comparison as one table: quality against measured density, with intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.compare import FORMS, settings_of
from llama_surgery.evaluation.intervals import mean_interval
from llama_surgery.evaluation.paired import paired_difference, perplexity_ratio
from llama_surgery.evaluation.summary_density import summary_density, summary_pairs

FORMAT, FORMAT_VERSION = "llama-surgery comparison", 1
#: Settings that every row repeats, so that a CSV stands alone.
_SHARED = (
    "model",
    "length",
    "windows",
    "needles",
    "seed",
    "dtype",
    "tf32",
    "llama_surgery",
    "torch",
    "transformers",
)


def merge(folder: Path) -> dict[str, Any]:
    """All that is finished in the folder of a comparison, whichever processes measured it.

    Returns:
        ``format``, ``format_version``, ``settings``, ``floors`` (smallest total density by form) and
        ``rows``, the dense model's first: see :func:`_row`. What was not measured is missing or None.

    Raises:
        SurgeryError: There is no comparison, or the dense model is not measured yet.
    """
    content = settings_of(folder)
    settings, prompts = content["settings"], content["prompts"]
    cells: dict[tuple[str, float], dict[str, Any]] = {}
    for file in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        cells.setdefault((cell["form"], cell["target"]), {})[cell["task"]] = cell
    dense = cells.get(("dense", 1.0), {})
    if not dense:
        raise SurgeryError(f"{folder}: the dense model is not measured yet, so that nothing can be compared.")
    budgets = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((folder / "budgets").glob("*.json"))
    }
    order = sorted(cells, key=lambda key: (FORMS.index(key[0]), key[1]))
    shared = {name: settings[name] for name in _SHARED}
    rows = [{**_row(key, cells[key], budgets[key[0]], dense, prompts, settings), **shared} for key in order]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "floors": {name: budget["floor"] for name, budget in budgets.items() if budget["floor"] < 1},
        "rows": rows,
    }


def _row(
    key: tuple[str, float],
    cells: Mapping[str, Any],
    budget: Mapping[str, Any],
    dense: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """One form at one density.

    Densities are measured on what was asked: ``total_density`` over the perplexity windows,
    ``prefill_density`` and ``decode_density`` while the needles were answered. They do not count summaries of
    unseen pages: ``summary_density``, ``prefill_summary_density`` and ``decode_summary_density`` are what
    these cost at most, in the same unit (:func:`~llama_surgery.evaluation.summary_density.summary_pairs`).
    ``needle`` is over all prompts, ``needle_kept`` over those that the dense model answered, each with
    Wilson's 95% interval; ``needle_bound`` is the one-sided 95% lower bound of the paired difference to
    dense, in closed form, and ``needle_changed`` counts prompts that one of both answered alone.
    """
    any_cell, seed = next(iter(cells.values())), settings["seed"]
    config = SurgeryConfig.from_dict(any_cell["setting"]) if "theta" in any_cell["setting"] else None
    row: dict[str, Any] = {
        "form": key[0],
        "title": budget["title"],
        "ahead": budget["ahead"],
        "floor": budget["floor"],
        "target_density": key[1],
        "total_density": None,
        "summary_density": summary_density(config, settings["length"]) if config else 0.0,
        "knob": any_cell["setting"].get("knob", "theta" if config else ""),
        "number": any_cell["setting"].get("number", any_cell["setting"].get("theta")),
    }
    losses, dense_losses = (_found(c, "perplexity", "per_window") for c in (cells, dense))
    if losses is not None and dense_losses is not None:
        ratio = perplexity_ratio(dense_losses, losses, seed)
        row |= {
            "total_density": cells["perplexity"]["density"]["prefill"],
            "perplexity": _perplexity(losses),
            "dense_perplexity": _perplexity(dense_losses),
            "perplexity_ratio": ratio.ratio,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }
    answers, dense_answers = (_found(c, "needles", "answers") for c in (cells, dense))
    if answers is not None and dense_answers is not None:
        kept = [float(after) for before, after in zip(dense_answers, answers, strict=True) if before]
        paired = paired_difference(dense_answers, answers, seed)
        row |= _named("needle", mean_interval(answers))
        row |= _named("needle_kept", mean_interval(kept) if kept else (None, None, None))
        row |= {
            "dense_needle": paired.dense,
            "needle_difference": paired.difference,
            "needle_bound": paired.bound_closed,
            "needle_changed": paired.lost + paired.won,
        }
        row |= {f"{phase}_density": value for phase, value in cells["needles"]["density"].items()}
        row |= _needle_summaries(config, [prompt["length"] for prompt in prompts])
        row |= {f"needle_{name}": share for name, share in _by_variant(answers, prompts).items()}
    row["seconds"] = sum(cell["seconds"] for cell in cells.values())
    row["device"] = any_cell["device"]
    return row


def _needle_summaries(config: SurgeryConfig | None, lengths: Sequence[int]) -> dict[str, float]:
    """What summaries cost at most while needles were answered: prompts, and steps at their ends."""
    prefill = decode = 0.0
    for length in lengths if config else ():
        prefill += summary_pairs(0, length, config, config.tile)
        decode += summary_pairs(length - 1, length, config, 1)
    return {
        "prefill_summary_density": prefill / sum(length * (length + 1) / 2 for length in lengths),
        "decode_summary_density": decode / sum(lengths),
    }


def _found(cells: Mapping[str, Any], task: str, what: str) -> list[Any] | None:
    return cells[task][what] if task in cells else None


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def _named(name: str, interval: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def _by_variant(answers: Sequence[bool], prompts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_variant: dict[str, list[bool]] = {}
    for right, prompt in zip(answers, prompts, strict=True):
        by_variant.setdefault(prompt["variant"], []).append(right)
    return {name: sum(rights) / len(rights) for name, rights in by_variant.items()}

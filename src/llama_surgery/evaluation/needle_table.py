"""Answers to needles by variant, kind of value and length, compared where the dense model could answer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_surgery.evaluation.intervals import mean_interval
from llama_surgery.evaluation.needle_variants import VARIANTS

if TYPE_CHECKING:
    from llama_surgery.evaluation.needle import NeedlePrompt

#: By what the rows of a comparison tell prompts apart; what is left out runs over everything.
GROUPINGS = (("variant",), ("variant", "kind"), ("variant", "length"), ("variant", "kind", "length"))


def compare_needles(
    prompts: "Sequence[NeedlePrompt]",
    dense: Sequence[bool],
    operated: Mapping[str, Sequence[bool]],
) -> list[dict[str, Any]]:
    """Accuracies by properties of the prompts.

    What the dense model cannot do, the operation cannot lose: the difference runs over those prompts alone
    that the dense model answered. There the dense accuracy is 1, so the paired difference is the operated
    accuracy less 1, with Wilson's interval. Prompts that only the operated model answered are counted
    beside, in ``won``: the difference leaves them out and so rather overstates the loss.

    Args:
        prompts: What was asked.
        dense: Whether the dense model answered each.
        operated: The same for each operated model, by name.

    Returns:
        One row for each combination that occurs, by :data:`GROUPINGS`: its properties, ``count``, ``dense``
        (accuracy) with its 95% interval ``dense_low``, ``dense_high``, and ``operated``: for each name
        ``accuracy``, ``compared`` (prompts that the dense model answered), ``difference``, ``low`` and
        ``high`` (None where nothing is compared), ``lost`` and ``won``.
    """
    rows = []
    for keys in GROUPINGS:
        cells: dict[tuple[Any, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            cells.setdefault(tuple(getattr(prompt, key) for key in keys), []).append(index)
        for cell in sorted(cells, key=lambda cell: [_order(part) for part in cell]):
            right = [dense[index] for index in cells[cell]]
            share, low, high = mean_interval(list(map(float, right)))
            rows.append(
                {
                    **dict(zip(keys, cell, strict=True)),
                    "count": len(right),
                    "dense": share,
                    "dense_low": low,
                    "dense_high": high,
                    "operated": {
                        name: _compared(right, [answers[index] for index in cells[cell]])
                        for name, answers in operated.items()
                    },
                }
            )
    return rows


def _order(value: Any) -> Any:
    return list(VARIANTS).index(value) if value in VARIANTS else value


def _compared(dense: Sequence[bool], operated: Sequence[bool]) -> dict[str, Any]:
    kept = [float(after) for before, after in zip(dense, operated, strict=True) if before]
    share, low, high = mean_interval(kept) if kept else (None, None, None)
    return {
        "accuracy": sum(operated) / len(operated),
        "compared": len(kept),
        "difference": None if share is None else share - 1,
        "low": None if low is None else low - 1,
        "high": None if high is None else high - 1,
        "lost": kept.count(0.0),
        "won": sum(after and not before for before, after in zip(dense, operated, strict=True)),
    }

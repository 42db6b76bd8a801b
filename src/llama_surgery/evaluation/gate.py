"""The gate of a deployment: does a model lose more than it may?"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.compare_result import FORMAT as COMPARISON
from llama_surgery.report.results import read_results


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a sparse form may have lost, at worst.

    Attributes:
        name: Of the form, with its density.
        perplexity_ratio: Upper end of the two-sided 95% interval of perplexity over dense, or None.
        needle_loss: Upper one-sided 95% bound of dense accuracy less operated accuracy, or None.
    """

    name: str
    perplexity_ratio: float | None
    needle_loss: float | None

    def failures(self, max_ratio: float | None, max_loss: float | None) -> list[str]:
        """Why the form may not pass, one sentence a limit; a limit on what was not measured fails too."""
        told = []
        for what, bound, limit in (
            ("perplexity over dense", self.perplexity_ratio, max_ratio),
            ("loss of needles", self.needle_loss, max_loss),
        ):
            if limit is None:
                continue
            if bound is None:
                told.append(f"{self.name}: {what} was not measured, and its limit is {limit:.4g}.")
            elif not bound <= limit:
                told.append(f"{self.name}: {what} may be {bound:.4f}, and its limit is {limit:.4g}.")
        return told


def read_losses(path: Path, form: str | None = None, density: float | None = None) -> list[Loss]:
    """Losses in a results file of ``compare`` or of ``evaluate``.

    Args:
        path: The file.
        form: Name of the form, or of the operated model, to look at; None for all that are sparse.
        density: Of a comparison only what was asked for this total density; None for all.

    Raises:
        SurgeryError: The file cannot be read, or holds no such form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"{path} cannot be read ({error}): give a file that 'compare' or 'evaluate --out' wrote."
        ) from error
    if isinstance(content, dict) and content.get("format") == COMPARISON:
        found = [
            (row["form"], _of_row(row))
            for row in content["rows"]
            if (density is None or abs(row["target_density"] - density) < 1e-4)
            and (form is not None or row["target_density"] < 1)
        ]
    elif density is not None:
        raise SurgeryError(f"{path} is no comparison of densities: leave the density out.")
    else:
        found = [(row["name"], _of_operated(row)) for row in read_results(path)["operated"]]
    losses = [loss for name, loss in found if form in (None, name)]
    if not losses:
        there = ", ".join(dict.fromkeys(name for name, _ in found)) or "nothing"
        raise SurgeryError(
            f"{path} holds no {form or 'form'}"
            + (f" at a density of {density:g}" if density is not None else "")
            + f"; there is {there}."
        )
    return losses


def _of_row(row: dict[str, Any]) -> Loss:
    bound = row.get("needle_bound")
    name = f"{row['form']} at {row['target_density']:.3g}"
    return Loss(name, row.get("ratio_high"), None if bound is None else -bound)


def _of_operated(row: dict[str, Any]) -> Loss:
    needle = row["needle"]
    return Loss(row["name"], row["ratio"]["high"], None if needle is None else -needle["bound_closed"])

"""The results file: what an evaluation found, and it in a few rows, for the terminal and for the page."""

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_surgery.errors import SurgeryError, check_version

if TYPE_CHECKING:
    from llama_surgery.evaluation.result import EvaluationResult

FORMAT = "llama-surgery results"
FORMAT_VERSION = 1

_NEEDED = ("model", "length", "windows", "seed", "environment", "dense", "operated", "needles")


def make_results(result: "EvaluationResult", **more: Any) -> dict[str, Any]:
    """Everything the report shows, as plain values ready for JSON.

    ``more`` is what the evaluation itself does not know: ``conditions`` (texts, calibration …), ``decode_ms``
    (milliseconds a token in decode, by name of the measured model), ``trees`` (heads' over a short text).
    """
    return {**header(), **more, **result.to_dict()}


def header() -> dict[str, Any]:
    """What every results file begins with."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "created": created}


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        SurgeryError: The file is missing, damaged, newer than this release or something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(
            f"{path} cannot be read ({error.strerror}): give a file that 'evaluate --out' wrote."
        ) from error
    except ValueError as error:
        raise SurgeryError(f"{path} is not JSON ({error}): write it again with 'evaluate --out'.") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise SurgeryError(
            f"{path} is not a results file: give one that 'llama-surgery evaluate --out' wrote."
        )
    check_version(f"{path} has format version", results.get("format_version"), FORMAT_VERSION)
    missing = [name for name in _NEEDED if name not in results]
    if missing or not results["operated"]:
        raise SurgeryError(
            f"{path} lacks {', '.join(missing) or 'an operated model'}: nothing to draw. Write it again, "
            "with 'evaluate --text … --out'."
        )
    return results


#: With fewer samples an interval says nothing, or promises more than it can keep: it is left out.
_FEW_WINDOWS, _FEW_NEEDLES = 10, 100


class Cell(NamedTuple):
    """A figure and a remark in smaller print."""

    text: str
    note: str = ""


class Row(NamedTuple):
    """A measure: its name, a remark, and one cell for each model, the dense one first."""

    name: str
    note: str
    cells: list[Cell]


def columns(results: dict[str, Any]) -> list[str]:
    """Names of the measured models, the dense one first."""
    return ["dense", *(f"operated, {measured['name']}" for measured in results["operated"])]


def rows(results: dict[str, Any]) -> list[Row]:
    """Rows of a results file; measures that were not taken are left out."""
    dense, operated = results["dense"], results["operated"]
    length, windows, asked = results["length"], results["windows"], len(results["needles"])
    densities, none = [m["density"] for m in operated], Cell("–")
    losses = [Cell(f"{dense['perplexity']:.2f}"), *map(_perplexity, operated)]
    kl = [Cell(f"{m['kl']:.4f}", f"{m['top1']:.1%} agree") for m in operated]
    far = [Cell(f"{d['far_density']:.2%}", f"{d['visible_far_density']:.2%} visible") for d in densities]
    total = [Cell("100%"), *(Cell(f"{d['total_density']:.2%}") for d in densities)]
    table = [
        Row("Perplexity", f"{windows} window{'s' * (windows != 1)} of {length:,} tokens", losses),
        Row("KL to dense, nats a token", "share of positions with the same likeliest token", [none, *kl]),
    ]
    if asked:
        answered = [Cell(f"{dense['needle_accuracy']:.1%}"), *map(_needle, operated)]
        table.append(Row("Needles answered", f"{asked} prompts, by greedy generation", answered))
    table += [
        Row("Far density", "far (query, key) pairs read, of all causal pairs", [none, *far]),
        Row("Total density", "with the near field and means of unread pages", total),
        Row(
            "Prefill",
            f"{length:,} tokens",
            _timed([m["seconds_per_window"] for m in (dense, *operated)], "s"),
        ),
    ]
    names, decode = ["dense", *(m["name"] for m in operated)], results.get("decode_ms", {})
    if all(name in decode for name in names):
        times = _timed([decode[name] for name in names], "ms")
        table.append(Row("Decode", f"a token, after {length:,}", times))
    return table


def _perplexity(measured: dict[str, Any]) -> Cell:
    ratio = measured["ratio"]
    note = f"× {ratio['ratio']:.4f}"
    if ratio["count"] >= _FEW_WINDOWS:
        note += f" ({ratio['low']:.4f} … {ratio['high']:.4f})"
    return Cell(f"{measured['perplexity']:.2f}", note)


def _needle(measured: dict[str, Any]) -> Cell:
    paired = measured["needle"]
    note = f"{100 * paired['difference']:+.1f} points"
    if paired["count"] >= _FEW_NEEDLES:
        low = paired.get("low", paired.get("bound_closed"))  # its name in older files
        note += f"; 95% sure of ≥ {100 * low:+.1f}"
    return Cell(f"{measured['needle_accuracy']:.1%}", note)


def _timed(values: list[float], unit: str) -> list[Cell]:
    cells = [Cell(f"{values[0]:.3g} {unit}")]
    return cells + [Cell(f"{v:.3g} {unit}", f"{values[0] / v:.2f}× as fast") for v in values[1:]]

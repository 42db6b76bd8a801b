"""The results file: what an evaluation found, with all that the report shows besides."""

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "created": created}
    return {**header, **more, **result.to_dict()}


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
            f"{path} is damaged: {', '.join(missing) or 'an operated model'} missing. Write it again."
        )
    return results

"""The frontier: quality against density for many configurations, read from a CSV."""

import csv
import dataclasses
from pathlib import Path

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import wilson


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One configuration, measured; the fields are the columns of the CSV.

    The first are those of the configuration. Densities are executed pairs over causal pairs.

    Attributes:
        scoring: Which rows score which balls: ``all rows``; in files of older releases others too.
        ppl_ratio: Perplexity over the dense model's on the same windows, with its 95% interval.
        needle, dense_needle: Shares of needles answered, operated and dense.
        windows, needles: Windows and prompts that were measured on, of ``length`` tokens.
    """

    page_size: int
    chunk_size: int
    window: int
    tile: int
    scoring: str
    theta: float
    far_density: float
    total_density: float
    ppl: float
    ppl_ratio: float
    ratio_low: float
    ratio_high: float
    needle: float
    dense_ppl: float
    dense_needle: float
    windows: int
    needles: int
    length: int
    seed: int
    model: str

    @property
    def needle_interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of ``needle``."""
        return wilson(self.needle, max(1, self.needles))


COLUMNS = tuple(field.name for field in dataclasses.fields(FrontierPoint))


def read_frontier(path: Path) -> list[FrontierPoint]:
    """Read the points of ``path``; columns that are not a point's are ignored.

    Raises:
        SurgeryError: The file is missing or empty, a column is missing or a value is not a number.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SurgeryError(f"could not read the frontier {path}: {error}.") from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise SurgeryError(
            f"{path}: columns {', '.join(missing)} are missing. A frontier has the columns "
            f"{', '.join(COLUMNS)}."
        )
    return [_point(path, line, row) for line, row in enumerate(rows, start=2)]


def _point(path: Path, line: int, row: dict[str, str]) -> FrontierPoint:
    values: dict[str, object] = {}
    for field in dataclasses.fields(FrontierPoint):
        text = row[field.name] or ""
        try:
            values[field.name] = field.type(text)  # type: ignore[operator]
        except ValueError as error:
            raise SurgeryError(f"{path}, line {line}: {field.name}={text!r} is not a number.") from error
    return FrontierPoint(**values)  # type: ignore[arg-type]


def pareto(points: list[FrontierPoint]) -> list[FrontierPoint]:
    """Points that no other point beats: none reads less and has a lower perplexity ratio.

    Returns:
        By rising far density, of equal ones only the best.
    """
    front: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.far_density, p.ppl_ratio)):
        if not front or point.ppl_ratio < front[-1].ppl_ratio:
            front.append(point)
    return front

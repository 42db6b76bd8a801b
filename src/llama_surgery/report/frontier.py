"""The frontier: quality against density for many configurations, read from a CSV."""

import csv
import dataclasses
import math
from pathlib import Path
from statistics import NormalDist

from llama_surgery.errors import SurgeryError


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One configuration, measured; the fields are the columns of the CSV.

    Attributes:
        page_size: Keys of a page.
        chunk_size: Tokens of a chunk.
        window: Tokens that always stay in the near field.
        tile: Queries of a prefill tile.
        scoring: Which rows score which balls: ``all rows``; in files of older releases others too.
        theta: Share above which a row opens a page.
        far_density: Executed far pairs over causal pairs.
        total_density: The same with the near field.
        ppl: Perplexity, operated.
        ppl_ratio: Perplexity over the dense model's on the same windows.
        ratio_low: Lower end of the ratio's 95% interval.
        ratio_high: Upper end.
        needle: Share of needles answered, operated.
        dense_ppl: Perplexity of the dense model in the same run.
        dense_needle: Share of needles the dense model answered in the same run.
        windows: Windows the perplexity was measured on.
        needles: Prompts the needle share was measured on.
        length: Tokens of a window and of a prompt.
        seed: Of the windows and the needles.
        model: Name of the model.
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
        n, z = max(1, self.needles), NormalDist().inv_cdf(0.975)
        centre = (self.needle + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.needle * (1 - self.needle) / n + (z / (2 * n)) ** 2)
        return centre - half, centre + half


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

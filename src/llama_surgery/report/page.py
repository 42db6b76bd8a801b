"""The report: one HTML page with everything in it."""

import functools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from llama_surgery import __version__
from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_atomically
from llama_surgery.report import figures
from llama_surgery.report.frontier import FrontierPoint, frontier, pareto, read_frontier
from llama_surgery.report.results import columns, rows
from llama_surgery.report.tree import HeadTree, forest_view

#: Depths share a row of the needle grid until its cells hold this many prompts on average.
_PROMPTS_PER_CELL = 1.5


def write_report(results: dict[str, Any], path: Path, *, frontier: Path | None = None) -> None:
    """Write the page of a results file to ``path``, atomically, with a ``frontier``'s CSV if there is one.

    Raises:
        SurgeryError: The results or the frontier are damaged, or the file cannot be written.
    """
    points = [] if frontier is None else read_frontier(frontier)
    html = render(results, points)
    write_atomically(path, lambda file: file.write_text(html, encoding="utf-8"))


def render(results: dict[str, Any], points: list[FrontierPoint]) -> str:
    """The page as HTML.

    Raises:
        SurgeryError: The results lack something the page needs.
    """
    environment = Environment(
        loader=PackageLoader("llama_surgery.report", "templates"),
        autoescape=select_autoescape(("html",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        page = _page(results, points)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SurgeryError(
            f"the results are damaged ({type(error).__name__}: {error}). Write them again with "
            "'llama-surgery evaluate --out'."
        ) from error
    return environment.get_template("report.html").render(page=page)


def _page(results: dict[str, Any], points: list[FrontierPoint]) -> dict[str, Any]:
    first = results["operated"][0]
    ratio, read = first["ratio"]["ratio"], first["density"]["total_density"]
    return {
        "title": f"{results['model']} at {results['length']:,} tokens",
        "lead": (
            f"Operated ({first['name']}), the model reads {read:.1%} of what dense attention reads; its "
            f"perplexity is {ratio:.4f} times the dense model’s."
        ),
        "columns": columns(results),
        "summary": rows(results),
        "conditions": _conditions(results),
        "frontier": _frontier(points) if points else None,
        "position": _position(results),
        "needles": _needles(results) if results["needles"] else None,
        "densities": [_density(measured) for measured in results["operated"]],
        "trees": [forest_view(HeadTree.from_dict(tree)) for tree in results.get("trees", [])],
        "version": __version__,
        "created": results.get("created", "")[:10],
    }


def _conditions(results: dict[str, Any]) -> list[tuple[str, str]]:
    environment, threads = results["environment"], results["environment"]["threads"]
    listed = [
        ("model", f"{results['model']}, {environment['dtype']}"),
        ("device", f"{environment['device']}, {threads} thread{'s' * (threads != 1)}"),
        ("perplexity", f"{results['windows']} windows of {results['length']:,} tokens"),
    ]
    if needles := results["needles"]:
        lengths = ", ".join(f"{length:,}" for length in sorted({needle["length"] for needle in needles}))
        listed.append(("needles", f"{len(needles)} at {lengths} tokens"))
    listed += results.get("conditions", {}).items()
    listed.append(("seed", str(results["seed"])))
    names = {"llama_surgery": "llama-surgery", "torch": "PyTorch", "transformers": "transformers"}
    versions = [f"{label} {environment[name]}" for name, label in names.items()]
    listed.append(("versions", ", ".join([*versions, f"Python {environment['python']}"])))
    for measured in results["operated"]:
        config = measured["config"]
        if gumbel := config.get("gumbel"):
            arities = " or ".join(str(arity) for arity in gumbel["arities"])
            told = f"content routers (gumbel), trees whose nodes have {arities} children"
            listed.append((f"topology, {measured['name']}", told))
            continue
        decode = (
            f"in decode {config['theta_decode']:.3%}" if config["theta_decode"] else "decode reads everything"
        )
        told = (
            f"pages of {config['page_size']} in chunks of {config['chunk_size']}, window "
            f"{config['window']}, tiles of {config['tile']}, θ = {config['theta']:.3%}, {decode}"
        )
        listed.append((f"topology, {measured['name']}", told))
    return listed


def _position(results: dict[str, Any]) -> str:
    bins = [(b["from"], b["to"]) for b in results["dense"]["by_position"]]
    dense = [b["perplexity"] for b in results["dense"]["by_position"]]
    operated = {m["name"]: [b["perplexity"] for b in m["by_position"]] for m in results["operated"]}
    return figures.position_perplexity(bins, dense, operated)


def _needles(results: dict[str, Any]) -> str:
    names = ["dense", *(measured["name"] for measured in results["operated"])]
    band = _depth_bands(results["needles"])
    grids = {}
    for name in names:
        cells: dict[tuple[int, float], list[bool]] = defaultdict(list)
        for needle in results["needles"]:
            cells[needle["length"], band[needle["depth"]]].append(needle["right"][name])
        title = name if name == "dense" else f"operated, {name}"
        grids[title] = [
            figures.NeedleCell(length, depth, sum(rights), len(rights))
            for (length, depth), rights in sorted(cells.items())
        ]
    return figures.needle_grids(grids)


def _depth_bands(needles: list[dict[str, Any]]) -> dict[float, float]:
    """The middle of the band that each depth is shown in: one to a depth where there are prompts enough."""
    depths = sorted({needle["depth"] for needle in needles})
    lengths = len({needle["length"] for needle in needles})
    wide = 1
    while wide < len(depths) and len(needles) < _PROMPTS_PER_CELL * lengths * math.ceil(len(depths) / wide):
        wide += 1
    bands: dict[float, float] = {}
    for first in range(0, len(depths), wide):
        members = depths[first : first + wide]
        bands |= dict.fromkeys(members, (members[0] + members[-1]) / 2)
    return bands


def _density(measured: dict[str, Any]) -> dict[str, str]:
    by_layer = {int(layer): values for layer, values in measured["density"]["by_layer"].items()}
    return {
        "name": measured["name"],
        "heads": figures.head_density(by_layer),
        "layers": figures.layer_density(by_layer),
    }


_FRONT = {
    "page": "page_size",
    "chunk": "chunk_size",
    "window": "window",
    "tile": "tile",
    "scoring": "scoring",
}


def _frontier(points: list[FrontierPoint]) -> dict[str, Any]:
    shared = functools.partial(_shared, points)
    return {
        "figure": frontier(points),
        "conditions": (
            f"{len(points)} configurations; {shared('model')}, {shared('length')} tokens, "
            f"{shared('windows')} windows, {shared('needles')} needles, seed {shared('seed')}. "
            "Bars are 95% intervals."
        ),
        "columns": [*_FRONT, "θ", "far", "total", "perplexity ÷ dense", "needles"],
        "rows": [
            [
                *(str(getattr(point, name)) for name in _FRONT.values()),
                f"{point.theta:.2%}",
                f"{point.far_density:.2%}",
                f"{point.total_density:.2%}",
                f"{point.ppl_ratio:.4f}",
                f"{point.needle:.1%} (dense {point.dense_needle:.1%})",
            ]
            for point in pareto(points)
        ],
    }


def _shared(points: list[FrontierPoint], name: str) -> str:
    """The value all points share, or the range they span."""
    values = sorted({getattr(point, name) for point in points})
    told = [f"{v:,}" if isinstance(v, int) and name != "seed" else str(v) for v in values]
    return told[0] if len(told) == 1 else f"{told[0]} to {told[-1]}"

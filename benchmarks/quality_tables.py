"""The tables of quality: what an operated model loses, beside other rules, with learned corrections."""

import collections
import functools
import json
from collections.abc import Iterator
from typing import Any

from csv_tables import ROOT, Row, markdown, percent, ratio_told, read, tokens
from safetensors.torch import load_file

from llama_surgery.config import SurgeryConfig
from llama_surgery.evaluation.kept import adapter_digest
from llama_surgery.topology.router import PageRouter

#: Far densities of the usual budget. Others are points of loss_by_density.py, unless a loss set them.
USUAL = (0.045, 0.07)
#: Forms of benchmarks/real.py that are shown, and what they are called.
REAL = {"operated": "operated", "tokens": "oracle of keys", "blocks": "oracle of blocks of 64 × 64"}
#: What sets a row's density where a loss was given.
LOSS = "thresholds of `max_loss`"


def real_rows() -> list[tuple[str, Row]]:
    """Real models: of every form, way to decode, kind of threshold and adapter the newest row, and its form.

    Of those of one day the one of most windows and samples, and with budgets by head, which is the default.
    Rows of other budgets than the usual one are left to ``loss_by_density.py``.
    """
    newest: dict[tuple[str, ...], tuple[str, Row]] = {}

    for form, row in all_rows():
        least, most = USUAL
        if row["far_density"] and not least <= float(row["far_density"]) <= most and LOSS not in form:
            continue
        key = row["model"], row["length"], row["text"], form
        if key not in newest or age(row) >= age(newest[key][1]):
            newest[key] = form, row
    return list(newest.values())


def all_rows() -> Iterator[tuple[str, Row]]:
    """Rows of operated models and oracles, each with its form in words.

    Of learned corrections those in the repository, others only of lengths and texts that these were not
    measured on.
    """
    rows = [row for row in read("real_quality.csv") if row["form"] in REAL]
    told = {cell_of(row) for row in rows if _adapter(row) in shipped()}
    for row in rows:
        if _adapter(row) in {None, *shipped()} or cell_of(row) not in told:
            yield ", ".join([REAL[row["form"]], *_apart(json.loads(row["settings"]))]), row


def age(row: Row) -> tuple[str, int, int, bool]:
    """What a row is preferred by to others of its name."""
    return row["date"], int(row["windows"]), int(row["samples"]), "budgets" in json.loads(row["settings"])


def real() -> str:
    """What real models lose: :func:`real_rows`."""
    cells = []
    for form, row in real_rows():
        ruler = f"{float(row['ruler_dense']):.1f} → {float(row['ruler']):.1f}" if row["ruler"] else "–"
        cells.append(
            [
                row["model"].removesuffix(".gguf"), tokens(row["length"]), row["text"], form,
                percent(row["far_density"]), percent(row["total_density"]), ratio_told(row),
                percent(row["needles_dense"]), percent(row["needles_kept"]), ruler, row["windows"],
            ]
        )  # fmt: skip
    names = (
        "model", "tokens", "text", "form", "far density", "total density",
        "perplexity ÷ dense (95% interval)", "needles that dense answers", "of these kept", "RULER",
        "windows",
    )  # fmt: skip
    shown = [row for _, row in real_rows()]
    devices = ", ".join(sorted({row["device"].removeprefix("cuda: ") for row in shown}))
    seeds = ", ".join(sorted({row["seed"] for row in shown}))
    return markdown(names, cells) + f"\n\nSeed {seeds}, {devices}, until {max(row['date'] for row in shown)}."


def cell_of(row: Row) -> tuple[str, ...]:
    """Where a row was measured."""
    return row["model"].removesuffix(".gguf"), row["length"], row["text"]


def _adapter(row: Row) -> str | None:
    """The fingerprint of a row's learned corrections."""
    settings = json.loads(row["settings"])
    return settings["adapter"] if "learned" in settings else None


@functools.cache
def shipped() -> frozenset[str]:
    """Fingerprints of the adapters in the repository."""
    found = set()
    for file in (ROOT / "demo" / "adapters").glob("*/*.safetensors"):
        parts: dict[int, dict[str, Any]] = collections.defaultdict(dict)
        for name, tensor in load_file(file).items():
            if name.startswith("router."):
                _, index, part = name.split(".", 2)
                parts[int(index)][part] = tensor
        routers = {index: PageRouter(**values) for index, values in parts.items()}
        found.add(adapter_digest(SurgeryConfig(), routers))
    return frozenset(found)


def _apart(settings: dict[str, Any]) -> Iterator[str]:
    """What tells a row's settings from the default ones, in words."""
    if "learned" in settings:
        yield "learned" + ("" if settings["adapter"] in shipped() else f" ({settings['adapter'][:8]})")
    elif "adapter" in settings:
        yield LOSS
    if "page_size" in settings:
        yield f"pages of {settings['page_size']}"
    if "tile" in settings:
        yield f"tiles of {settings['tile']}"
    if "dense_until" in settings:
        yield f"dense below {settings['dense_until']:,}"
    if settings.get("decode") == "sparse":
        yield "sparse decode"


def quality() -> str:
    """Dense and operated, with the conditions below."""
    rows = read("acceptance.csv")
    cells = []
    for row in rows:
        line = [row["name"], f"{float(row['perplexity']):.2f}"]
        if row["name"] == "dense":
            line += ["–", percent(row["needle_accuracy"]), "–", "100%"]
        else:
            line[0] = f"operated, {row['name']}"
            line.append(ratio_told(row, "perplexity_ratio"))
            line += [percent(row[name]) for name in ("needle_accuracy", "far_density", "total_density")]
        cells.append(line)
    first = rows[0]
    conditions = (
        f"{first['model']}, {int(first['windows'])} windows of {int(first['length']):,} tokens, "
        f"{first['needles']} needles by greedy generation, seed {first['seed']}, "
        f"{first['dtype']} on {first['device']}, PyTorch {first['torch']}, "
        f"transformers {first['transformers']}."
    )
    names = ("", "perplexity", "÷ dense (95% interval)", "needles answered", "far density", "total density")
    return markdown(names, cells) + f"\n\n{conditions}"


def learning() -> str:
    """Learned corrections against the training-free default at equal executed far density."""
    rows = read("learning.csv")
    learned = [row for row in rows if row["idea"] != "default"]
    cells = []
    for tile, target in dict.fromkeys((row["tile"], row["target"]) for row in learned):
        seeds = [row for row in learned if (row["tile"], row["target"]) == (tile, target)]
        default = next(
            row for row in rows if (row["idea"], row["tile"], row["target"]) == ("default", tile, target)
        )
        cells.append(
            [
                tile, target, f"{float(default['ppl_ratio']):.4f}", mean(seeds, "ppl_ratio", ".4f"),
                f"{mean(seeds, 'gap_closed', '.2f')} ({ends(seeds, 'gap')})",
                f"{mean(seeds, 'first_gap_closed', '.2f')} ({ends(seeds, 'first_gap')})"
                if seeds[0]["first_gap_closed"]
                else "–",
            ]
        )  # fmt: skip
    first = learned[0]
    seeds_in_all = len({row["seed"] for row in learned})
    seconds = max(float(row["learning_seconds"]) for row in learned)
    names = (
        "T", "far density", "÷ dense, default", "÷ dense, learned", "gap closed",
        f"of the default's gap at {first['target']}",
    )  # fmt: skip
    about = (
        f"{first['model']}, {first['windows']} windows of {int(first['length']):,} tokens ({first['text']}), "
        f"mean of {seeds_in_all} seeds, in brackets the lowest and the highest end of their 95% intervals "
        "over windows. "
        f"Learned in {seconds:.0f} s. {first['device']}, PyTorch {first['torch']}."
    )
    return markdown(names, cells) + f"\n\n{about}"


def mean(rows: list[Row], name: str, form: str) -> str:
    return f"{sum(float(row[name]) for row in rows) / len(rows):{form}}"


def ends(rows: list[Row], name: str) -> str:
    low, high = (
        choose(float(r[f"{name}_{end}"]) for r in rows) for end, choose in (("low", min), ("high", max))
    )
    return f"{low:.2f} … {high:.2f}"


def rules() -> str:
    """Every rule at the measured densities nearest to 0.18 and to 0.3."""
    rows = [row for row in read("compare.csv") if row["perplexity_ratio"] and row["needle"]]
    cells = []
    for form in dict.fromkeys(row["form"] for row in rows if row["form"] not in ("dense", "full")):
        measured = [row for row in rows if row["form"] == form]
        line = [measured[0]["title"] + (" *" if measured[0]["ahead"] == "True" else "")]
        for wanted in (0.18, 0.3):
            row = min(measured, key=lambda row, wanted=wanted: abs(density(row) - wanted))  # type: ignore[misc]
            line += [
                f"{density(row):.2f}", ratio_told(row, "perplexity_ratio"), percent(row["needle_kept"]),
            ]  # fmt: skip
        cells.append(line)
    first = rows[0]
    about = (
        f"{first['model']}, {first['windows']} windows of {int(first['length']):,} tokens, "
        f"{first['needles']} needles of five kinds and three lengths, {first['dtype']}, "
        f"PyTorch {first['torch']}."
    )
    names = ("", *("density", "÷ dense (95% interval)", "needles kept") * 2)
    return markdown(names, cells) + f"\n\n{about}"


def density(row: Row) -> float:
    """What a row of compare.csv reads in all, summaries included."""
    return float(row["total_density"]) + float(row.get("summary_density") or 0)


def transfer() -> str:
    """Every row corrections of one domain, every column texts of one."""
    rows = read("transfer.csv")
    names = list(dict.fromkeys(row["tested_on"] for row in rows))
    default = [row for row in rows if row["idea"] == "default"]
    kinds = list(dict.fromkeys((row["idea"], row["learned_on"]) for row in rows))[1:]
    cells = [
        ["perplexity of the dense model", *(f"{float(r['dense_ppl']):.2f}" for r in _own(default, names))],
        ["÷ dense, default", *(f"{float(r['ppl_ratio']):.4f}" for r in _own(default, names))],
        *([f"gap closed: {_label(kind)}", *map(_closed, _own(_of(rows, kind), names))] for kind in kinds),
    ]
    carried = [
        [f"{_label(kind)}, θ of {origin}", *map(_carried, _own(_of(rows, kind), names, origin))]
        for kind in [("default", ""), *kinds]
        for origin in dict.fromkeys(r["theta_of"] for r in _of(rows, kind) if r["theta_of"] != r["tested_on"])
    ]
    lost = [
        [_label(kind), *(percent(r.get("mass_lost", "")) for r in _own(_of(rows, kind), names))]
        for kind in [("default", ""), *kinds]
    ]
    first = rows[0]
    steps = max(int(row["steps"]) for row in rows)
    about = (
        f"{first['model']}, {first['windows']} windows of {tokens(first['length'])} tokens of each domain, "
        f"T = {first['tile']}, chunks of {first['chunk_size']}, pages of {first['page_size']}, window "
        f"{first['window']}; {steps} steps of learning, seed {first['seed']}; {first['device']}, float32, "
        f"PyTorch {first['torch']}, transformers {first['transformers']}."
    )
    return "\n\n".join(
        (
            markdown(("", *names), cells),
            markdown(("far density by another domain's θ (÷ dense)", *names), carried),
            markdown(("attention lost, as scores expect it", *names), lost),
            about,
        )
    )


def _of(rows: list[Row], kind: tuple[str, str]) -> list[Row]:
    return [row for row in rows if (row["idea"], row["learned_on"]) == kind]


def _own(rows: list[Row], names: list[str], origin: str | None = None) -> list[Row]:
    """The row of every domain, with its own θ or that of ``origin``; empty where there is none."""
    found = {row["tested_on"]: row for row in rows if row["theta_of"] == (origin or row["tested_on"])}
    return [found.get(name, {}) for name in names]


def _label(kind: tuple[str, str]) -> str:
    return f"{kind[0]}, learned on {kind[1]}" if kind[1] else kind[0]


def _closed(row: Row) -> str:
    if not row:
        return "–"
    share, low, high = (float(row[name]) for name in ("gap_closed", "gap_low", "gap_high"))
    return f"{share:.2f} ({low:.2f} … {high:.2f})"


def _carried(row: Row) -> str:
    if not row or row["theta_of"] == row["tested_on"]:
        return "–"
    return f"{float(row['far_density']):.3f} ({float(row['ppl_ratio']):.4f})"

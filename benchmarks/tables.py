"""Writes the tables of README.md and docs/*.md from the CSV files in benchmarks/results.

    python benchmarks/tables.py           # write them
    python benchmarks/tables.py --check   # fail if one is not what its CSV says

A table stands between two comments, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, where NAME is a key
of TABLES. Everything else of a page is left alone.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
            ratio, low, high = (float(row[name]) for name in ("perplexity_ratio", "ratio_low", "ratio_high"))
            line.append(f"{ratio:.4f} ({low:.4f} … {high:.4f})")
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


#: The row of a whole call in prefill.csv.
WHOLE = "attention with layout and selection"


def prefill(name: str = "prefill.csv") -> str:
    """Attention of a prompt, everything included, against the dense rivals of the same run."""
    rows = read(name)
    cells = []
    for row in rows:
        if row["part"] != WHOLE:
            continue
        cells.append(
            [
                tokens(row["n"]), row["far"], row["selection"], row["directions"],
                f"{float(row['total_density']):.3f}",
                milliseconds(row["p50_ms"]),
                *(times(row.get(f"over_{name}")) for name in ("cuDNN", "FlashAttention-2")),
            ]
        )  # fmt: skip
    names = (
        "tokens", "far density", "selection", "directions", "total density", "milliseconds", "cuDNN ÷",
        "FlashAttention-2 ÷",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


def portable() -> str:
    """The same with the kernels that run on any GPU."""
    return prefill("prefill-portable.csv")


def repeats() -> str:
    """Times faster than cuDNN in the same process, at a total density of 0.1, of several runs."""
    rows = read("prefill-32k-repeats.csv")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    whole = [row for row in rows if row["part"] == WHOLE and f"{float(row['total_density']):.2f}" == "0.10"]
    cells = [
        [
            directions,
            *(f"{float(row['over_cuDNN']):.2f} ×" for row in whole if row["directions"] == directions),
        ]
        for directions in dict.fromkeys(row["directions"] for row in whole)
    ]
    return markdown(("directions", *(f"run {run}" for run in runs)), cells) + f"\n\n{conditions(rows[0])}"


def flex() -> str:
    """Everything of a prompt's attention against FlexAttention's attention alone, on the same pages."""
    rows = read("prefill.csv")
    cells = []
    for row in rows:
        if row["part"] == "FlexAttention":
            whole = next(r for r in rows if r["part"] == WHOLE and same(r, row, *LABEL))
            ratio = float(row["p50_ms"]) / float(whole["p50_ms"])
            cells.append(
                [tokens(row["n"]), *(milliseconds(r["p50_ms"]) for r in (whole, row)), f"{ratio:.1f} ×"]
            )
    names = ("tokens", "everything, milliseconds", "FlexAttention alone, milliseconds", "÷")
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


def parts() -> str:
    """Each part of a prompt's attention alone."""
    rows = read("prefill.csv")
    settings = [row for row in rows if row["part"] == "layout"]
    names = list(dict.fromkeys(row["part"] for row in rows if row["far"] and row["part"] != "FlexAttention"))
    cells = []
    for name in names:
        line = [name]
        for setting in settings:
            found = [r for r in rows if r["part"] == name and same(r, setting, *LABEL)]
            text = milliseconds(found[0]["p50_ms"]) if found else "–"
            if found and found[0].get("tflops"):
                text += f" ({float(found[0]['tflops']):.0f} TFLOP/s)"
            line.append(text)
        cells.append(line)
    header = (
        "milliseconds",
        *(
            f"{tokens(s['n'])}, far {s['far']}" + ("" if s["selection"] == "flat" else f", {s['selection']}")
            for s in settings
        ),
    )
    return markdown(header, cells) + f"\n\n{conditions(rows[0])}"


#: What names a setting in prefill.csv.
LABEL = ("n", "page", "tile", "ball", "directions", "variance_pool", "stride", "totals", "selection", "far")


def decode() -> str:
    """Attention of a decode step, beside the fastest dense rival of the same run."""
    rows = read("decode.csv")
    cells = []
    for row in rows:
        if row["part"] != "decode":
            continue
        step = [
            r for r in rows if r["part"] == "step" and same(r, row, "n", "batch", "page", "balls", "rows")
        ]
        cells.append(
            [
                tokens(row["n"]), row["batch"], f"{row['page']} / {row['balls']}", row["rows"],
                f"{1e3 * float(row['p50_ms']):.0f}", f"{float(row['executed_far']):.3f}",
                f"{float(row['GB_per_s']):.0f} ({percent(row['of_peak'])})", row["fastest_rival"] or "–",
                times(row["speedup"]), times(step[0]["p99_speedup"]) if step else "–",
            ]
        )  # fmt: skip
    names = (
        "tokens", "batch", "page / balls", "rows", "µs", "far density", "GB/s (of peak)",
        "fastest dense rival", "rival ÷", "rival ÷ p99 of steps",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


def paged() -> str:
    """Attention of decode steps on an engine's paged cache beside a contiguous one."""
    rows = read("decode-paged.csv")
    cells = []
    for row in rows:
        if row["part"] == "paged":
            one = next(r for r in rows if r["part"] == "contiguous" and r["batch"] == row["batch"])
            times = (f"{1e3 * float(r['p50_ms']):.1f}" for r in (one, row))
            cells.append([row["batch"], tokens(row["tokens"]), *times, percent(row["lost"])])
    names = ("sequences", "tokens in all", "contiguous, µs", "paged, µs", "lost")
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


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
            ratio, low, high = (float(row[name]) for name in ("perplexity_ratio", "ratio_low", "ratio_high"))
            line += [
                f"{density(row):.2f}", f"{ratio:.4f} ({low:.4f} … {high:.4f})", percent(row["needle_kept"]),
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
    return float(row["total_density"]) + float(row["summary_density"])


def end_to_end() -> str:
    """Time to first token and decode step of a whole model."""
    rows = read("end_to_end.csv")
    cells = []
    for row in rows:
        what = "time to first token" if row["part"] == "prefill" else "decode step"
        density = row["total_density"] and f"{float(row['total_density']):.3f}"
        cells.append(
            [
                what, row["side"], tokens(row["length"]), row["batch"], milliseconds(row["p50_ms"]),
                times(row["speedup"]), density or "1", f"{float(row['peak_gib']):.1f}", row["backend"],
            ]
        )  # fmt: skip
    names = (
        "", "side", "tokens", "batch", "milliseconds", "dense ÷", "total density", "peak GiB", "executed by",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{rows[0]['model']}, random weights. {conditions(rows[0])}"


def speed() -> str:
    """The figures of a first look: prompts of 128k, decode steps, a whole model."""
    lines = []
    for row in read("prefill.csv"):
        plain = row["selection"] == "flat" and row["directions"] == "principal"
        if row["part"] == WHOLE and int(row["n"]) in (1 << 13, 1 << 17) and plain:
            density = f"total density {float(row['total_density']):.3f}"
            name = f"attention of a prompt of {tokens(row['n'])} tokens, {density}"
            against = (f"{times(row[f'over_{rival}'])} {rival}" for rival in ("cuDNN", "FlashAttention-2"))
            lines.append((name, ", ".join(against)))
    for row in read("decode.csv"):
        headline = row["page"] == row["balls"] == "64" and row["rows"] == "1"
        if row["part"] == "decode" and headline and int(row["n"]) == 1 << 17:
            density = f"far density {float(row['executed_far']):.2f}, batch {row['batch']}"
            name = f"attention of a decode step at {tokens(row['n'])} tokens, {density}"
            lines.append((name, f"{times(row['speedup'])} {row['fastest_rival']}"))
    for row in read("end_to_end.csv"):
        if row["side"] == "operated":
            what = (
                "time to first token" if row["part"] == "prefill" else f"decode step, batch {row['batch']},"
            )
            name = f"{what} of {tokens(row['length'])} tokens, shapes of an 8B Llama"
            lines.append((name, f"{times(row['speedup'])} the best dense backend"))
    first = read("prefill.csv")[0]
    return markdown((f"{first['device']}, {first['dtype']}", "faster than dense by"), lines)


def growth() -> str:
    """Time per token of each part, as a multiple of that at the shortest length."""
    rows = [row for row in read("growth.csv") if row["far"]]
    lengths = sorted({int(row["n"]) for row in rows})
    cells = []
    for part in dict.fromkeys(row["part"] for row in rows):
        per_token = {int(r["n"]): float(r["p50_ms"]) / int(r["n"]) for r in rows if r["part"] == part}
        if lengths[0] in per_token:
            cells.append([part, *(f"{per_token[n] / per_token[lengths[0]]:.2f}" for n in lengths)])
    return markdown(("time per token ÷", *map("{:,}".format, lengths)), cells) + f"\n\n{conditions(rows[0])}"


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


TABLES: dict[str, Callable[[], str]] = {
    "results": quality,
    "speed": speed,
    "prefill": prefill,
    "portable": portable,
    "repeats": repeats,
    "flex": flex,
    "parts": parts,
    "growth": growth,
    "decode": decode,
    "paged": paged,
    "learning": learning,
    "rules": rules,
    "end-to-end": end_to_end,
    "transfer": transfer,
}


def same(one: Row, other: Row, *names: str) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def percent(value: str) -> str:
    return f"{float(value):.1%}" if value else "–"


def milliseconds(value: str) -> str:
    return f"{float(value):.3g}" if float(value) < 1000 else f"{float(value):,.0f}"


def times(value: str | None) -> str:
    return f"{float(value):.1f} ×" if value else "–"


def tokens(value: str) -> str:
    return f"{int(value):,}"


def conditions(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, PyTorch {row['torch']}, Triton {row['triton']}, {row['date']}."


def filled(text: str) -> str:
    """The page with every table in it made anew."""
    for name in re.findall(r"<!-- ([\w-]+): begin -->", text):
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}: known are {', '.join(TABLES)}.")
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a table is out of date"
    )
    given = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if old != new:
            stale.append(str(page.relative_to(ROOT)))
            if not given.check:
                page.write_text(new, encoding="utf-8")
    if given.check and stale:
        print(f"out of date: {', '.join(stale)}. Run: python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables of times: prefill, decode and a whole model on a GPU."""

from csv_tables import RESULTS, Row, conditions, markdown, milliseconds, percent, read, same, times, tokens

#: Times of the defaults, and what stands for them until they are there.
ATTENTION, NOTHING = "attention.csv", "Not measured yet."

#: The row of a whole call in prefill.csv and attention.csv.
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
                tokens(row["n"]), row["far"], row["selection"],
                f"{float(row['total_density']):.3f}",
                milliseconds(row["p50_ms"]),
                *(times(row.get(f"over_{rival}")) for rival in ("cuDNN", "FlashAttention-2")),
            ]
        )  # fmt: skip
    names = (
        "tokens", "far density", "selection", "total density", "milliseconds", "cuDNN ÷",
        "FlashAttention-2 ÷",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


def attention() -> str:
    """Attention of a prompt with the defaults, everything included, for groups of several sizes."""
    rows = measured(ATTENTION)
    cells = [
        [
            tokens(row["n"]), f"{row['heads']} / {row['kv_heads']}", f"{float(row['executed_far']):.3f}",
            f"{float(row['total_density']):.3f}", milliseconds(row["p50_ms"]),
            *(times(row.get(f"over_{rival}")) for rival in ("cuDNN", "FlashAttention-2")),
        ]
        for row in rows
        if row["part"] == WHOLE
    ]  # fmt: skip
    names = (
        "tokens", "query / KV heads", "far density", "total density", "milliseconds", "cuDNN ÷",
        "FlashAttention-2 ÷",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}" if rows else NOTHING


def attention_parts() -> str:
    """Each part of it alone."""
    rows = measured(ATTENTION)
    return parts_of(rows) if rows else NOTHING


def measured(name: str) -> list[Row]:
    """Rows of a file that need not be there."""
    return read(name) if (RESULTS / name).exists() else []


def portable() -> str:
    """The same with the kernels that run on any GPU."""
    return prefill("prefill-portable.csv")


def repeats() -> str:
    """Times faster than cuDNN in the same process, at a total density of 0.1, of several runs."""
    rows = read("prefill-32k-repeats.csv")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    whole = [row for row in rows if row["part"] == WHOLE and f"{float(row['total_density']):.2f}" == "0.10"]
    cells = [["cuDNN ÷", *(f"{float(row['over_cuDNN']):.2f} ×" for row in whole)]]
    return markdown(("", *(f"run {run}" for run in runs)), cells) + f"\n\n{conditions(rows[0])}"


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
    return parts_of(read("prefill.csv"))


def parts_of(rows: list[Row]) -> str:
    """Each part of the settings of which parts were timed."""
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
            f"{tokens(s['n'])}, far {s['far']}"
            + ("" if s.get("selection", "flat") == "flat" else f", {s['selection']}")
            for s in settings
        ),
    )
    return markdown(header, cells) + f"\n\n{conditions(rows[0])}"


#: What names a setting in prefill.csv.
LABEL = ("n", "heads", "page", "tile", "ball", "variance_pool", "stride", "totals", "selection", "far")

#: Shapes that prefill is timed with and levels of the tree; an H200's FLOP/s and bytes/s by its data sheet.
HEADS, KV_HEADS, DIM, PAGE, POOL, LEVELS = 32, 8, 128, 64, 8, 3

FLOP_RATE, BYTE_RATE = 990e12, 4.8e12


def floors() -> str:
    """What parts would take at the rates of the data sheet, and that as a share of what they took."""
    found: dict[str, dict[str, Row]] = {}
    for name in ("prefill.csv", "prefill-portable.csv"):
        found[name] = {}
        for row in read(name):
            if (row["n"], row["far"]) == (str(1 << 17), "0.05"):
                found[name][row["part"]] = row
    hopper, portable = found.values()
    n = 1 << 17
    pages = n * n / 2 / PAGE * HEADS * 2 * (DIM + DIM / POOL)  # FLOPs of scoring every page before a row
    near, far = (float(portable[part]["flops"]) for part in ("near field", "far pages"))
    states = n * KV_HEADS * DIM
    lines = (
        ("layout", "layout", hopper, (4 * LEVELS + 8) * states / BYTE_RATE),
        ("`feature_kernel`", "features", hopper, 8 * states / PAGE / BYTE_RATE),
        ("`totals_kernel`, near field", "totals, near field", portable, near / 2 / FLOP_RATE),
        ("`totals_kernel`, pages", "totals, pages", portable, pages / 4 / FLOP_RATE),
        ("`list_kernel`", "lists", portable, pages / FLOP_RATE),
        ("`attend_kernel`, near field", "near field", portable, near / FLOP_RATE),
        ("`attend_kernel`, far pages", "far pages", portable, far / FLOP_RATE),
        ("`hopper_select_kernel`", "selection", hopper, (near / 2 + pages / 4 + pages) / FLOP_RATE),
        ("`hopper_attend_kernel`, near field", "near field", hopper, near / FLOP_RATE),
        ("`hopper_attend_kernel`, far pages", "far pages", hopper, far / FLOP_RATE),
    )
    cells = []
    for name, part, measured, seconds in lines:
        took = measured[part]["p50_ms"]
        cells.append([name, f"{1e3 * seconds:.2g}", milliseconds(took), f"{1e3 * seconds / float(took):.0%}"])
    names = ("", "floor, milliseconds", "measured", "share")
    return markdown(names, cells) + f"\n\n{conditions(hopper['layout'])}"


def rates() -> str:
    """Rate of what far pages add to the near field, beside that of dense attention in the same run."""
    rows = read("prefill.csv")
    dense = {row["n"]: float(row["tflops"]) for row in rows if row["part"] == "cuDNN"}
    cells = []
    for row in rows:
        if row["part"] == "far pages" and row["selection"] == "flat":
            rate, rival = float(row["tflops"]), dense[row["n"]]
            cells.append([tokens(row["n"]), row["far"], f"{rate:.0f}", f"{rival:.0f}", f"{rate / rival:.0%}"])
    names = ("tokens", "far density", "far pages, TFLOP/s", "cuDNN, dense, TFLOP/s", "share")
    return markdown(names, cells) + f"\n\n{conditions(rows[0])}"


def balls(row: Row) -> str:
    """Keys of the balls that pages were scored by; of later rows, whose pages are scored whole, a page's."""
    return row.get("balls") or row["page"]


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
                tokens(row["n"]), row["batch"], f"{row['page']} / {balls(row)}", row["rows"],
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
        flat = row["selection"] == "flat"
        if row["part"] == WHOLE and int(row["n"]) in (1 << 13, 1 << 17) and flat:
            density = f"total density {float(row['total_density']):.3f}"
            name = f"attention of a prompt of {tokens(row['n'])} tokens, {density}"
            against = (f"{times(row[f'over_{rival}'])} {rival}" for rival in ("cuDNN", "FlashAttention-2"))
            lines.append((name, ", ".join(against)))
    for row in read("decode.csv"):
        headline = row["page"] == balls(row) == "64" and row["rows"] == "1"
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

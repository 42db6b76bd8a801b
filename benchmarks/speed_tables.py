"""The tables of times: prefill, decode and a whole model on a GPU."""

from csv_tables import RESULTS, Row, conditions, markdown, milliseconds, percent, read, same, times, tokens

#: Times of the defaults, and what stands for them until they are there.
ATTENTION, NOTHING = "attention.csv", "Not measured yet."

#: Columns of serving_gpu.csv, and what they are. Tokens per second of other rows follow from a step's time.
SERVED = {
    "ttft_ms": "first token, ms",
    "cached_ms": "first token of a cached prompt, ms",
    "tpot_ms": "a further token, ms",
    "tokens_per_s": "tokens per second under load",
}

#: The row of a whole call in it, and what names a setting.
WHOLE, LABEL = "attention with layout and selection", ("n", "heads", "page", "tile", "far")


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


def measured(name: str) -> list[Row]:
    """Rows of a file that need not be there."""
    return read(name) if (RESULTS / name).exists() else []


def attention_parts() -> str:
    """Each part of the settings of which parts were timed."""
    rows = measured(ATTENTION)
    if not rows:
        return NOTHING
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
    header = ("milliseconds", *(f"{tokens(s['n'])}, far {s['far']}" for s in settings))
    return markdown(header, cells) + f"\n\n{conditions(rows[0])}"


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


def serving() -> str:
    """A server's first token, time per token and load, beside the dense engine's of the same shapes."""
    rows = [row | ({"tokens_per_s": ""} if row["tpot_ms"] else {}) for row in read("serving_gpu.csv")]
    beside = [row for row in rows if row["mode"] == "dense"]
    where = ("length", "batch", "date")
    dense = {(*(row[n] for n in where), part): row[part] for part in SERVED for row in beside if row[part]}
    cells = []
    for row in rows:
        for part, name in SERVED.items():
            rival = dense.get((*(row[n] for n in where), part))
            if row["mode"] != "dense" and row[part] and rival:
                steps = "sparse" if row["mode"] == "sparse" else "dense"
                cells.append(
                    [
                        name, steps, tokens(row["length"]), row["batch"], percent(row["far_density"]),
                        milliseconds(rival), milliseconds(row[part]),
                        f"{float(row[part]) / float(rival):.2f}",
                    ]
                )  # fmt: skip
    names = ("", "decode steps", "tokens", "batch", "far density", "dense", "operated", "÷ dense")
    room = {row["mode"]: int(row["kv_tokens"]) for row in rows}
    kept = f"{room['operated'] / room['dense']:.3f} of dense's room for keys and values"
    first = rows[0]
    return (
        markdown(names, cells) + f"\n\n{first['device']}, vLLM {first['version']}, {first['model']}; {kept}."
    )

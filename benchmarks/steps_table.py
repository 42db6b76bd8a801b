"""The table of long runs of decode steps."""

from csv_tables import markdown, percent, ratio_told, read, tokens


def table() -> str:
    """A text read token by token behind a prompt: benchmarks/sparse_steps.py."""
    rows, cells = read("sparse_steps.csv"), []
    for row in rows:
        parts = [[float(row[f"{what}_{n}"]) for n in range(1, 5)] for what in ("ratio", "divergence")]
        cells.append(
            [
                row["model"].removesuffix(".gguf"), row["text"], tokens(row["prompt"]), row["decode"],
                percent(row["far_density"]), ratio_told(row),
                ", ".join(f"{part:.3f}" for part in parts[0]),
                ", ".join(f"{part:.4f}" for part in parts[1]), row["windows"],
            ]
        )  # fmt: skip
    names = (
        "model", "text", "tokens of the prompt", "steps", "far density of steps", "÷ dense (95% interval)",
        "by quarters of the steps", "KL in nats, by quarters", "windows",
    )  # fmt: skip
    first = rows[0]
    conditions = f"{first['steps']} steps, {first['dtype']}, seed {first['seed']}, {first['device']}."
    return markdown(names, cells) + f"\n\n{conditions}"

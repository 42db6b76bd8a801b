"""The frontier that led to the defaults: quality against measured density, on one model.

    python benchmarks/frontier.py MODEL --calibration-text DIR --text DIR --device cuda

Rows go to benchmarks/results/frontier.csv as they are measured; rows already there are not measured again.
"""

import argparse
import platform
import time
from pathlib import Path

import torch
import transformers
from csv_tables import merge, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, SurgeryError, config_of, operated, reset_statistics, statistics
from llama_surgery.evaluation.intervals import paired_difference, perplexity_ratio
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "frontier.csv"
#: What identifies a row.
KEYS = (
    *("page_size", "chunk_size", "window", "tile", "scoring", "target"),
    *("model", "length", "windows", "needles", "seed"),
)


def variants() -> list[tuple[SurgeryConfig, float]]:
    """(configuration, target far density), the most informative first."""
    rows = []

    def add(target: float, **change: object) -> None:
        rows.append((SurgeryConfig(**change), target))

    for tile in (64, 1, 16, 32):
        for page in (32, 64, 16, 128):
            for target in (0.06, 0.03):
                add(target, tile=tile, page_size=page)
    gpu = {"page_size": 64}
    for change in (
        {"chunk_size": 2048},
        gpu | {"chunk_size": 2048},
        {"window": 128},
        {"window": 64},
        {"chunk_size": 256, "window": 320},
        {"chunk_size": 1024},
        {"page_size": 128, "chunk_size": 2048},
    ):
        add(0.06, **change)
    # At 8,192 tokens all of these read as much in all.
    for chunk, window, target in (
        (512, 192, 0.05945), (256, 192, 0.08923), (256, 128, 0.10436),
        (128, 192, 0.10436), (256, 64, 0.1195), (128, 128, 0.1195),
    ):  # fmt: skip
        add(target, **gpu, chunk_size=chunk, window=window)
    for change in ({"window": 128}, {"chunk_size": 2048}):
        add(0.06, tile=1, **change)
    for tile in (64, 1):
        for target in (0.015, 0.12):
            add(target, tile=tile)
    return rows


def describe(config: SurgeryConfig, target: float, options: argparse.Namespace) -> dict[str, str]:
    """The identifying columns, as text."""
    row = vars(options) | config.to_dict() | {"scoring": "all rows", "target": target}
    row["model"] = Path(options.model).name
    return {key: str(row[key]) for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--needles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop before starting a row later than this"
    )
    parser.add_argument("--only", type=int, default=None, help="measure this many rows at most")
    parser.add_argument("--needle-batch", type=int, default=8)
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth row from the Ith"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    started = time.time()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    calibration = read_texts(options.calibration_text)
    texts = read_texts(options.text)
    ids = windows(tokenizer, texts, options.length, options.windows, options.seed)
    lengths = [options.length // 4, options.length // 2, options.length - 16]
    needles = needle_prompts(tokenizer, texts, count=options.needles, lengths=lengths, seed=options.seed)
    dense = perplexity(model, ids)
    dense_right = score_needles(model, needles, options.needle_batch)
    accuracy = sum(dense_right) / len(needles)
    print(
        f"dense: perplexity {dense.value:.4f}, needle {accuracy:.3f}, {time.time() - started:.0f} s",
        flush=True,
    )

    done = (
        {tuple(row[key] for key in KEYS) for row in rows_of(options.out)} if options.out.exists() else set()
    )
    for config, target in variants()[options.shard[0] : options.only : options.shard[1]]:
        key = describe(config, target, options)
        if tuple(key.values()) in done:
            continue
        if time.time() - started > options.seconds:
            print("out of time; run again to go on")
            break
        try:
            with operated(
                model, config, density=target, text=calibration, tokenizer=tokenizer, length=options.length
            ):
                config = config_of(model)
                measured = perplexity(model, ids)
                read = statistics(model)
                reset_statistics(model)
                right = score_needles(model, needles, options.needle_batch)
                generated = statistics(model).by_tile
        except SurgeryError as error:
            print(key, error)
            continue
        ratio = perplexity_ratio(dense.per_window, measured.per_window)
        paired = paired_difference(dense_right, right)
        row = key | {
            "theta": config.theta,
            "theta_decode": config.theta_decode,
            "far_density": read.far_density,
            "visible_far_density": read.visible_far_density,
            "total_density": read.total_density,
            "decode_far_density": generated["1"]["far_density"],
            "ppl": measured.value,
            "ppl_ratio": ratio.ratio,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "needle": paired.operated,
            "needle_bound": paired.low,
            "dense_ppl": dense.value,
            "dense_needle": accuracy,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        merge(options.out, [row], None, KEYS)
        shown = " ".join(f"{k}={v}" for k, v in key.items())
        print(
            f"{shown} far {row['far_density']:.4f} total {row['total_density']:.4f} "
            f"ratio {row['ppl_ratio']:.4f} needle {row['needle']:.3f} {time.time() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

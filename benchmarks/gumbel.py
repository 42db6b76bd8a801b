"""The preprint's router: perplexity at its measured density, by arity and radius.

    python -m benchmarks.gumbel MODEL --train-text DIR --text DIR --device cuda --arities 2 3 4 5

A router is trained for each arity with the language-model loss, then measured at the radii asked for, or at
the smallest whose measured total density is not below ``--total``. Rows go to ``--out`` as they are measured.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from benchmarks.matching import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery.evaluation.io import write_csv
from llama_surgery.evaluation.paired import perplexity_ratio
from llama_surgery.learning.gumbel import GumbelSettings
from llama_surgery.learning.gumbel_attach import gumbel_in
from llama_surgery.learning.gumbel_trainer import GumbelStep, learn_gumbel
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "gumbel.csv"


def main() -> None:
    options = _parser().parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    train, texts = read_texts(options.train_text), read_texts(options.text)
    ids = windows(tokenizer, texts, options.length, options.windows, options.evaluation_seed)
    dense, rows = losses_of(model, ids, 1), []
    for arity in options.arities:
        begun = time.time()
        settings = GumbelSettings(
            length=options.length, steps=options.steps, arities=(arity,), seed=options.seed
        )
        learned_on = windows(tokenizer, train, options.length, options.train_windows, 100 + options.seed)
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        last: dict = {}

        def tell(step: GumbelStep, last: dict = last, arity: int = arity) -> None:
            last.update(dataclasses.asdict(step))
            if step.step % max(1, options.steps // 10) == 0:
                print(f"  arity {arity} {step}", flush=True)

        gumbel = learn_gumbel(model, learned_on, settings, tell)
        seconds = time.time() - begun
        torch.set_float32_matmul_precision("highest")
        levels = max(levels for router in gumbel.routers.values() for levels, _ in router.shapes)
        for radius in options.radii or range(levels + 1):
            gumbel.settings = dataclasses.replace(settings, radius=radius)
            gumbel.reset()
            with gumbel_in(model, gumbel):
                losses = losses_of(model, ids, 1)
            ratio = perplexity_ratio(dense.per_window, losses.per_window, 0)
            rows.append(
                {
                    "arity": arity,
                    "levels": levels,
                    "radius": radius,
                    "length": options.length,
                    "windows": options.windows,
                    "steps": options.steps,
                    "seed": options.seed,
                    "total_density": gumbel.density(),
                    "ppl": losses.value,
                    "dense_ppl": dense.value,
                    "ppl_ratio": ratio.ratio,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                    "training_loss": last["loss"],
                    "balance": last["balance"],
                    "learning_seconds": round(seconds, 1),
                }
            )
            write_csv(options.out, rows)
            print(f"arity {arity} radius {radius}: total {gumbel.density():.4f} ratio {ratio.ratio:.5f}")
            if not options.radii and gumbel.density() >= options.total:
                break


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("--train-text", required=True, type=Path)
    add("--text", required=True, type=Path)
    add("--device", default="cpu")
    add("--arities", type=int, nargs="+", default=[2])
    add("--radii", type=int, nargs="+", help="all from 0 until --total is reached if left out")
    add("--total", type=float, default=0.165, help="total density that is to be reached")
    add("--steps", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--tf32", action="store_true", help="faster products while learning, on a GPU")
    add("--length", type=int, default=8192)
    add("--train-windows", type=int, default=100)
    add("--windows", type=int, default=24)
    add("--evaluation-seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()

"""Arity of the tree: perplexity at equal far density for p = 2, 3, 4, 5, nothing learned.

    python -m benchmarks.arity MODEL --text DIR --device cuda

A chunk holds page_size · p^L tokens, so chunks and with them the near field differ between arities; p = 2 is
measured at chunks around each, and p = 4 at a chunk that p = 2 has too. Pages are scored by their own
moments.
"""

import argparse
from pathlib import Path

import torch
from benchmarks.matching import losses_of, matched
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, operated
from llama_surgery.evaluation.io import write_csv
from llama_surgery.evaluation.paired import perplexity_ratio
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "arity.csv"
#: Arity and tokens of a chunk, for pages of 32.
TREES = ((2, 512), (4, 512), (2, 256), (3, 288), (2, 1024), (3, 864), (5, 800), (2, 128), (5, 160))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-batch", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.06)
    parser.add_argument("--theta", type=float, default=0.046, help="where the search for the density begins")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    ids = windows(tokenizer, read_texts(options.text), options.length, options.windows, options.seed)
    dense, rows = losses_of(model, ids, 1), []
    for arity, chunk in TREES:
        config = SurgeryConfig(
            arity=arity, chunk_size=chunk, moment_size=32, theta=options.theta, backend="gather"
        )
        with operated(model, config):
            measured = matched(model, ids, options.window_batch, options.density)
        ratio = perplexity_ratio(dense.per_window, measured.losses.per_window, 0)
        rows.append(
            {
                "arity": arity,
                "chunk_size": chunk,
                "length": options.length,
                "windows": options.windows,
                "theta": measured.config.theta,
                "far_density": measured.read.far_density,
                "total_density": measured.read.total_density,
                "ppl_ratio": ratio.ratio,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
        write_csv(options.out, rows)
        print(
            f"arity {arity} chunk {chunk}: far {measured.read.far_density:.4f} total "
            f"{measured.read.total_density:.4f} ratio {ratio.ratio:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

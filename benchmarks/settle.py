"""Needles with and without rows of their own for a prompt's end, on the same prompts of one operated model.

    python benchmarks/settle.py MODEL --calibration-text DIR --text DIR --device cuda

The row goes to benchmarks/results/settle.csv: three accuracies on the same prompts, and paired bounds.
"""

import argparse
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, operated
from llama_surgery.evaluation.io import write_csv
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.paired import paired_difference
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.text import read_texts

RESULTS = Path(__file__).parent / "results" / "settle.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--needles", type=int, default=400)
    parser.add_argument("--needle-batch", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    texts = read_texts(options.text)
    prompts = needle_prompts(
        tokenizer, texts, count=options.needles, lengths=[options.length], seed=options.seed
    )
    dense = score_needles(model, prompts, options.needle_batch)
    with operated(
        model,
        SurgeryConfig(),
        density=options.density,
        text=read_texts(options.calibration_text),
        tokenizer=tokenizer,
        length=options.length,
    ):
        settled = score_needles(model, prompts, options.needle_batch)
        # generate() tells every cache where its prompt ends: one that does not know knows no such rule.
        with mock.patch.object(PagedCache, "prompt_ends", None):
            unsettled = score_needles(model, prompts, options.needle_batch)
    gain = paired_difference(unsettled, settled, options.seed)
    to_dense = paired_difference(dense, settled, options.seed)
    row = {
        "model": Path(options.model).name,
        "length": options.length,
        "needles": len(prompts),
        "seed": options.seed,
        "density": options.density,
        "dense": sum(dense) / len(prompts),
        "settled": sum(settled) / len(prompts),
        "unsettled": sum(unsettled) / len(prompts),
        "gained": sum(a and not b for a, b in zip(settled, unsettled, strict=True)),
        "lost": sum(b and not a for a, b in zip(settled, unsettled, strict=True)),
        "gain_bound": gain.bound_closed,
        "settled_minus_dense_bound": to_dense.bound_closed,
        "torch": torch.__version__,
    }
    write_csv(options.out, [row])
    print(row)


if __name__ == "__main__":
    main()

"""Planted facts of one kind, asked of the dense model and of adapters: a CSV with paired differences.

    python -m benchmarks.needles demo/books-26m --text VAL --calibration-text TRAIN \\
        --adapter out/learned-0 --adapter out/learned-1 --density 0.06 --device cuda --out needles.csv

Every adapter's thresholds are calibrated to the density first, those of prompts and those of decode steps;
its learned corrections stay. Answers come from greedy ``generate()``.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_surgery
from llama_surgery.evaluation.intervals import paired_difference
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.files import write_csv
from llama_surgery.surgery.operation import config_of, routers_of
from llama_surgery.text import read_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--text", type=Path, required=True, help="haystacks")
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--density", type=float, default=0.06, help="executed far density of every adapter")
    parser.add_argument("--length", type=int, default=8192, help="tokens of half the prompts; the rest half")
    parser.add_argument("--needles", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = (
        AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
        .to(given.device)
        .eval()
    )
    prompts = needle_prompts(
        tokenizer,
        read_texts(given.text),
        count=given.needles,
        lengths=[given.length // 2, given.length],
        seed=given.seed,
    )
    dense = score_needles(model, prompts, given.batch)
    text = read_texts(given.calibration_text)
    rows: list[dict[str, Any]] = []
    for folder in given.adapter:
        began = time.time()
        llama_surgery.load_adapter(model, folder)
        config, routers = config_of(model), routers_of(model)
        llama_surgery.eject(model)
        config = dataclasses.replace(config, backend="auto")
        with llama_surgery.operated(
            model,
            config,
            routers=routers,
            density=given.density,
            text=text,
            tokenizer=tokenizer,
            length=given.length,
        ):
            llama_surgery.reset_statistics(model)
            right = score_needles(model, prompts, given.batch)
            read = llama_surgery.statistics(model).by_tile
            config = config_of(model)
        paired = paired_difference(dense, right)
        row = {
            "adapter": folder.name if folder.name != f"tile-{config.tile}" else folder.parent.name,
            "tile": config.tile,
            "summary": config.summary,
            "asked": given.density,
            "theta": config.theta,
            "theta_decode": config.theta_decode,
            "prompt_far_density": read[str(config.tile)]["far_density"],
            "decode_far_density": read["1"]["far_density"],
            "needles": len(right),
            "dense": paired.dense,
            "operated": paired.operated,
            "difference": paired.difference,
            "bound": paired.low,
            "changed": paired.lost + paired.won,
            "length": given.length,
            "seed": given.seed,
            "model": Path(given.model).name,
            "dtype": given.dtype,
            "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        rows.append(row)
        write_csv(given.out, rows)
        print(
            f"{folder}: {paired.operated:.4f} of {len(right)}, dense {paired.dense:.4f}, difference at least "
            f"{paired.low:+.4f} (95%), {time.time() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""The preprint's router: perplexity, tokens that rows see and blocks with some of them, by arity and radius.

    python -m benchmarks.gumbel MODEL --train-text DIR --text DIR --device cuda --arities 2 3 4 5

A router is trained for each arity with the language-model loss (radius: half the levels), then measured at
the radii asked for, or at all from 0 until the token density reaches ``--total``. ``total_density`` of a row
is (row, key) pairs that the mask shows over causal pairs: what sparsity of tokens promises. It is executed by
plain PyTorch, which masks and skips nothing.

Rows go to ``--out`` as they are measured and are not measured again; training goes on from its checkpoints in
``--checkpoints``.
"""

import argparse
import dataclasses
import platform
import time
from pathlib import Path

import torch
from benchmarks.csv_tables import merge, rows_of
from benchmarks.matching import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, operated, statistics
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.perplexity import Perplexity
from llama_surgery.gumbel.learn import GumbelLearning, GumbelStep, learn_gumbel
from llama_surgery.gumbel.router import ContentRouter
from llama_surgery.gumbel_config import GumbelConfig
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "gumbel.csv"
#: What identifies a row.
KEYS = (
    *("model", "arity", "radius", "window", "length", "train_length", "train_text", "train_windows", "steps"),
    *("rate", "seed", "tf32", "windows", "evaluation_seed", "text"),
)


def main() -> None:
    options = _parser().parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    train, texts = read_texts(options.train_text), read_texts(options.text)
    ids = windows(tokenizer, texts, options.length, options.windows, options.evaluation_seed)
    train_length = options.train_length or options.length
    learned_on = windows(tokenizer, train, train_length, options.train_windows, 100 + options.seed)
    head = Head(model, ids[0])
    dense = losses_of(model, ids, 1, head)
    print(f"dense: perplexity {dense.value:.4f}", flush=True)
    for arity in options.arities:
        begun, last = time.time(), {}
        config = GumbelConfig(
            arities=(arity,), window=options.window, length=max(options.length, learned_on.shape[1])
        )
        routers = _learned(model, learned_on, config, options, last)
        seconds = round(time.time() - begun, 1)
        levels = max(levels for router in routers.values() for levels, _ in router.shapes)
        for radius in options.radii or range(levels + 1):
            key = _key(options, arity, radius)
            rows = rows_of(options.out) if options.out.exists() else []
            row = next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)
            if row is None:
                about = {"levels": levels, "trained_radius": levels // 2, "learning_seconds": seconds, **last}
                measured = _measured(
                    model, ids, head, routers, dataclasses.replace(config, radius=radius), dense, options
                )
                row = key | about | measured
                merge(options.out, [row], None, KEYS)
            _tell(row)
            if not options.radii and float(row["total_density"]) >= options.total:
                break


def _learned(
    model: torch.nn.Module,
    ids: torch.Tensor,
    config: GumbelConfig,
    options: argparse.Namespace,
    last: dict,
) -> dict[int, ContentRouter]:
    """Train routers of one arity, or go on; ``last`` gets what the last step told."""
    settings = GumbelLearning(steps=options.steps, rate=options.rate, seed=options.seed)
    (arity,) = config.arities

    def tell(step: GumbelStep) -> None:
        last.update(training_loss=step.loss, balance=step.balance, training_density=step.density)
        if step.step % max(1, options.steps // 10) == 0:
            print(f"  arity {arity} {step}", flush=True)

    file = None
    if options.checkpoints is not None:
        file = options.checkpoints / f"arity-{arity}-seed-{options.seed}.pt"
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    surgery = SurgeryConfig(topology="gumbel", gumbel=config)
    routers = learn_gumbel(model, surgery, ids, settings, tell, checkpoint_file=file, every_seconds=30)
    torch.set_float32_matmul_precision("highest")
    return routers


def _measured(
    model: torch.nn.Module,
    ids: torch.Tensor,
    head: Head,
    routers: dict[int, ContentRouter],
    config: GumbelConfig,
    dense: Perplexity,
    options: argparse.Namespace,
) -> dict:
    """Losses and densities at the radius of ``config``."""
    surgery = SurgeryConfig(topology="gumbel", gumbel=config)
    begun = time.time()
    with operated(model, surgery, routers=routers):
        losses = losses_of(model, ids, 1, head)
        read = statistics(model)
    ratio = perplexity_ratio(dense.per_window, losses.per_window)
    return {
        "total_density": read.near_density + read.visible_far_density,
        "ppl": losses.value,
        "dense_ppl": dense.value,
        "ppl_ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "seconds": round(time.time() - begun, 1),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }


def _key(options: argparse.Namespace, arity: int, radius: int) -> dict[str, str]:
    values = vars(options) | {
        "arity": arity,
        "radius": radius,
        "train_length": options.train_length or options.length,
        "text": options.text.name,
        "train_text": options.train_text.name,
        "model": Path(options.model).name,
    }
    return {name: str(values[name]) for name in KEYS}


def _tell(row: dict) -> None:
    def number(name: str) -> str:
        return f"{float(row[name]):.4f}"

    print(
        f"arity {row['arity']} radius {row['radius']}: tokens {number('total_density')}; ratio "
        f"{float(row['ppl_ratio']):.5f}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gumbel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder or name of a dense checkpoint")
    add("--train-text", required=True, type=Path, help="file or folder of texts that routers learn on")
    add("--text", required=True, type=Path, help="file or folder of texts that are measured")
    add("--device", default="cpu")
    add("--arities", type=int, nargs="+", default=[2], help="children of a node; a router each")
    add("--radii", type=int, nargs="+", help="all from 0 until --total is reached if left out")
    add("--total", type=float, default=0.165, help="token density that is to be reached")
    add("--window", type=int, default=128, help="last tokens that every row sees")
    add("--steps", type=int, default=100, help="of training, each on one window")
    add("--rate", type=float, default=1e-3, help="Adam's learning rate")
    add("--seed", type=int, default=0, help="of routers, noise and training windows")
    add("--tf32", action="store_true", help="faster products while learning, on a GPU")
    add("--length", type=int, default=8192, help="tokens of a measured window")
    add("--train-length", type=int, help="tokens of a training window, if not the same")
    add("--train-windows", type=int, default=100)
    add("--windows", type=int, default=24, help="windows that are measured")
    add("--evaluation-seed", type=int, default=0, help="of the measured windows")
    add("--checkpoints", type=Path, help="folder in which a killed training finds its state")
    add("--out", type=Path, default=RESULTS, help="CSV of all rows")
    return parser


if __name__ == "__main__":
    main()

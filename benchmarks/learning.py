"""What learning is worth: each idea against the training-free default at equal measured executed far density.

    python benchmarks/learning.py MODEL --train-text DIR --text DIR --device cuda --seconds 420

Every idea is learned on the training texts, its global θ set there by the ordinary calibration, then moved
until the far density executed on the evaluation windows equals the default's to within 1%. Rows go to
benchmarks/results/learning.csv as they are measured; ideas already there are not measured again.
"""

import argparse
import csv
import dataclasses
import itertools
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, config_of, operated, reset_statistics, save_adapter, statistics
from llama_surgery.evaluation.io import write_csv
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.paired import paired_difference, perplexity_ratio
from llama_surgery.evaluation.perplexity import Perplexity, perplexity
from llama_surgery.learning.corrections import scorer_parameters
from llama_surgery.learning.gumbel import Gumbel, GumbelSettings, gumbel_in, learn_gumbel
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.trainer import Step, learn
from llama_surgery.surgery.operate import set_config
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "learning.csv"
#: What identifies a row.
KEYS = ("idea", "tile", "target", "length", "steps", "rate", "temperatures", "seed", "windows")
#: Name of an idea to the summary of unseen pages that it uses and its stages, (stage, parts). A later stage
#: goes on from the one before; without stages nothing is learned.
IDEAS: dict[str, tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "default": ("none", ()),
    "page": ("page", ()),
    "ball": ("ball", ()),
    "chunk": ("chunk", ()),
    "chunk+scores": ("chunk", (("logits", ("scores", "summary")),)),
    "chunk+channels+tree": ("chunk", (("logits", ("channels", "tree", "summary")),)),
    "page+scores": ("page", (("logits", ("scores", "summary")),)),
    "ball+scores": ("ball", (("logits", ("scores", "summary")),)),
    "budgets": ("none", (("logits", ()),)),
    "scores": ("none", (("logits", ("scores",)),)),
    "channels": ("none", (("logits", ("channels",)),)),
    "tree": ("none", (("logits", ("scores", "tree")),)),
    "local": ("none", (("local", ("scores",)),)),
    "page+channels+tree": ("page", (("logits", ("channels", "tree", "summary")),)),
    "ball+channels+tree": ("ball", (("logits", ("channels", "tree", "summary")),)),
    "page+local": ("page", (("local", ("scores", "summary")),)),
    "page+local+logits": ("page", (("local", ("scores", "summary")), ("logits", ("scores", "summary")))),
}
#: Executed far density of an idea may differ from the default's by this share.
TOLERANCE = 0.01


@dataclasses.dataclass
class Bench:
    """What all rows share."""

    options: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    train: list[str]
    ids: torch.Tensor
    needles: list
    started: float

    def seconds(self) -> float:
        return time.time() - self.started


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses of an operated model, and the configuration they were measured with."""

    losses: Perplexity
    config: SurgeryConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """What the ideas for one tile and density share; without a default it is the default's own turn."""

    dense: Perplexity
    dense_right: Sequence[bool]
    config: SurgeryConfig
    target: float
    default: Measured | None = None
    density: float = 0.0


def main() -> None:
    options = _parser().parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    texts, train = read_texts(options.text), read_texts(options.train_text)
    ids = windows(tokenizer, texts, options.length, options.windows, options.evaluation_seed)
    needles = []
    if options.needles:
        lengths = [options.length // 2, options.length - 16]
        needles = needle_prompts(
            tokenizer, texts, count=options.needles, lengths=lengths, seed=options.evaluation_seed
        )
    bench = Bench(options, model, tokenizer, train, ids, needles, time.time())
    dense = perplexity(model, ids)
    dense_right = score_needles(model, needles, options.needle_batch) if needles else []
    print(f"dense: perplexity {dense.value:.4f}, {bench.seconds():.0f} s", flush=True)

    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    measured: list[dict] = []

    def keep(row: dict) -> None:
        measured.append(row)
        if tuple(row[name] for name in KEYS) not in done:
            rows.append(row)
            write_csv(options.out, rows)

    for tile, target in itertools.product(options.tiles, options.densities):
        job = Job(dense, dense_right, _config(options, tile), target)
        row, default = _measure(bench, job, "default", 0)
        job = dataclasses.replace(job, default=default, density=row["far_density"], config=default.config)
        keep(row)
        if options.gumbel_steps and bench.seconds() < options.seconds:
            keep(_measure_gumbel(bench, job, row["total_density"]))
        for seed, idea in itertools.product(options.seeds, options.ideas):
            key = _key(idea, job, seed, options)
            if tuple(key.values()) in done:
                continue
            if bench.seconds() > options.seconds:
                print(f"out of time before {idea}, T = {tile}, seed {seed}")
                continue
            keep(_measure(bench, job, idea, seed)[0])
    _table(measured, dense)


def _measure(bench: Bench, job: Job, idea: str, seed: int) -> tuple[dict, Measured]:
    """Learn one idea and measure it."""
    options, begun, last = bench.options, time.time(), {}
    key, config, target = _key(idea, job, seed, bench.options), job.config, job.target
    corrections = None
    learned_on = windows(bench.tokenizer, bench.train, options.length, options.train_windows, 100 + seed)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    summary, stages = IDEAS[idea]
    config = dataclasses.replace(config, summary=summary)
    for stage, parts in stages:
        settings = LearningSettings(
            density=target,
            length=options.length,
            steps=options.steps,
            parts=parts,
            stage=stage,
            rate=options.rate,
            seed=seed,
            first_temperature=options.temperatures[0],
            last_temperature=options.temperatures[1],
        )

        def tell(step: Step, stage: str = stage) -> None:
            last.update(dataclasses.asdict(step))
            if step.step % max(1, options.steps // 10) == 0:
                print(
                    f"  {idea} {stage} {step.step}/{options.steps} loss {step.loss:.5f} density "
                    f"{step.density:.4f} soft {step.soft_density:.4f} lost {step.mass_lost:.4f} "
                    f"{step.seconds:.0f} s",
                    flush=True,
                )

        corrections = learn(bench.model, config, learned_on, settings, start=corrections, progress=tell)
    learning_seconds = time.time() - begun
    torch.set_float32_matmul_precision("highest")
    routers = None if corrections is None else scorer_parameters(corrections)
    with operated(
        bench.model,
        config,
        routers=routers,
        density=target,
        text=bench.train,
        tokenizer=bench.tokenizer,
        length=options.length,
    ):
        losses, read = _perplexity(bench)
        for _ in range(4):
            if job.default is None or abs(read.far_density / job.density - 1) <= TOLERANCE:
                break
            now = config_of(bench.model)
            theta = now.theta * (read.far_density / job.density) ** 1.2
            decode = theta if now.tile == 1 else now.theta_decode
            set_config(bench.model, dataclasses.replace(now, theta=theta, theta_decode=decode))
            losses, read = _perplexity(bench)
        config = config_of(bench.model)
        right, generated = [], None
        if bench.needles:
            reset_statistics(bench.model)
            right = score_needles(bench.model, bench.needles, options.needle_batch)
            generated = statistics(bench.model).by_tile["1"]["far_density"]
        if options.adapters is not None and corrections is not None:
            name = "-".join(key[part] for part in ("idea", "tile", "target", "seed"))
            save_adapter(bench.model, options.adapters / name)
    ratio = perplexity_ratio(job.dense.per_window, losses.per_window, seed)
    row = key | {
        "theta": config.theta,
        "theta_decode": config.theta_decode,
        "far_density": read.far_density,
        "visible_far_density": read.visible_far_density,
        "total_density": read.total_density,
        "decode_far_density": generated,
        "ppl": losses.value,
        "dense_ppl": job.dense.value,
        "ppl_ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }
    closed = (None, None, None)
    if job.default is not None:
        closed = gap_closed(job.dense, job.default.losses, losses)
    row |= dict(zip(("gap_closed", "gap_low", "gap_high"), closed, strict=True))
    row |= _needle_columns(job, right, seed) | {
        "learning_seconds": round(learning_seconds, 1),
        "training_loss": last.get("loss"),
        "mass_lost": last.get("mass_lost"),
    }
    row |= _environment(options)
    print(
        f"{idea} T={key['tile']} seed {seed}: far {row['far_density']:.4f} ratio {row['ppl_ratio']:.5f} "
        f"closed {closed[0]} needle {row['needle']} {bench.seconds():.0f} s",
        flush=True,
    )
    return row, Measured(losses, config)


def _measure_gumbel(bench: Bench, job: Job, total: float) -> dict:
    """The preprint's router, at the smallest radius whose measured total density is not below ``total``."""
    options, begun, last = bench.options, time.time(), {}
    settings = GumbelSettings(
        length=options.length, steps=options.gumbel_steps, arities=tuple(options.arities)
    )
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    learned_on = windows(bench.tokenizer, bench.train, options.length, options.train_windows, 100)

    def tell(step: object) -> None:
        last.update(dataclasses.asdict(step))
        if step.step % max(1, settings.steps // 10) == 0:
            print(
                f"  gumbel {step.step}/{settings.steps} loss {step.loss:.4f} balance {step.balance:.3f} "
                f"density {step.density:.4f} {time.time() - begun:.0f} s",
                flush=True,
            )

    gumbel = learn_gumbel(bench.model, learned_on, settings, tell)
    learning_seconds = time.time() - begun
    torch.set_float32_matmul_precision("highest")
    levels = max(levels for router in gumbel.routers.values() for levels, _ in router.shapes)
    for radius in range(levels + 1):
        gumbel.settings = dataclasses.replace(settings, radius=radius)
        if _gumbel_perplexity(bench, gumbel, bench.ids[:1])[1] >= total:
            break
    losses, density = _gumbel_perplexity(bench, gumbel, bench.ids)
    right = []
    if bench.needles:
        with gumbel_in(bench.model, gumbel):
            right = score_needles(bench.model, bench.needles, options.needle_batch)
    ratio = perplexity_ratio(job.dense.per_window, losses.per_window, 0)
    closed = gap_closed(job.dense, job.default.losses, losses)
    row = _key("gumbel", job, 0, options) | {"steps": str(settings.steps), "rate": str(settings.rate)}
    row |= {"total_density": density, "ppl": losses.value, "dense_ppl": job.dense.value}
    row |= {"ppl_ratio": ratio.ratio, "ratio_low": ratio.low, "ratio_high": ratio.high}
    row |= dict(zip(("gap_closed", "gap_low", "gap_high"), closed, strict=True))
    row |= _needle_columns(job, right, 0) | {
        "learning_seconds": round(learning_seconds, 1),
        "training_loss": last.get("loss"),
    }
    row |= _environment(options) | {"radius": radius}
    print(
        f"gumbel radius {radius}: total {density:.4f} ratio {ratio.ratio:.5f} {bench.seconds():.0f} s",
        flush=True,
    )
    return row


def _gumbel_perplexity(bench: Bench, gumbel: Gumbel, ids: torch.Tensor) -> tuple[Perplexity, float]:
    gumbel.reset()
    with gumbel_in(bench.model, gumbel):
        return perplexity(bench.model, ids), gumbel.density()


def _needle_columns(job: Job, right: Sequence[bool], seed: int) -> dict:
    if not right:
        return {"needle": None, "dense_needle": None, "needle_bound": None, "needles": 0}
    paired = paired_difference(job.dense_right, right, seed)
    return {
        "needle": paired.operated,
        "dense_needle": paired.dense,
        "needle_bound": paired.bound_closed,
        "needles": len(right),
    }


def _environment(options: argparse.Namespace) -> dict:
    return {
        "model": Path(options.model).name,
        "text": options.text.name,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "radius": None,
    }


def _perplexity(bench: Bench) -> tuple[Perplexity, object]:
    reset_statistics(bench.model)
    losses = perplexity(bench.model, bench.ids)
    return losses, statistics(bench.model)


def gap_closed(dense: Perplexity, default: Perplexity, learned: Perplexity) -> tuple[float, float, float]:
    """Share of the gap in mean loss between default and dense that learning closes: 1 is all of it.

    Returns:
        The share, and its 95% interval by a paired bootstrap over windows (percentiles).
    """
    d, b, o = (np.asarray(x.per_window) for x in (dense, default, learned))
    picks = np.random.default_rng(0).integers(0, len(d), size=(10_000, len(d)))
    shares = 1 - (o - d)[picks].mean(1) / (b - d)[picks].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(1 - (o - d).mean() / (b - d).mean()), float(low), float(high)


def _config(options: argparse.Namespace, tile: int) -> SurgeryConfig:
    """The default topology for a tile. One executor for all rows: kernels do not take learned corrections."""
    given = {name: getattr(options, name) for name in ("chunk_size", "page_size", "window")}
    given = {name: value for name, value in given.items() if value is not None}
    return SurgeryConfig(tile=tile, backend="gather", **given)


def _key(idea: str, job: Job, seed: int, options: argparse.Namespace) -> dict[str, str]:
    learned = idea == "gumbel" or bool(IDEAS[idea][1])
    values = {
        "idea": idea,
        "tile": job.config.tile,
        "target": job.target,
        "length": options.length,
        "steps": options.steps if learned else 0,
        "rate": options.rate if learned else 0,
        "temperatures": "-".join(map(str, options.temperatures)) if learned else 0,
        "seed": seed if learned else 0,
        "windows": options.windows,
    }
    return {name: str(values[name]) for name in KEYS}


def _table(rows: list[dict], dense: Perplexity) -> None:
    print(f"\ndense perplexity {dense.value:.4f}")
    head = f"{'idea':20} {'T':>3} {'seed':>4} {'far':>7} {'total':>7} {'ratio':>8}"
    print(f"{head} {'gap closed (95%)':>24} {'needle':>7} {'s':>6}")
    for row in rows:
        closed = "-"
        if row["gap_closed"] is not None:
            closed = f"{row['gap_closed']:.3f} ({row['gap_low']:.3f} to {row['gap_high']:.3f})"
        needle = "-" if row["needle"] is None else f"{row['needle']:.3f}"
        far = "-" if row.get("far_density") is None else f"{row['far_density']:.4f}"
        print(
            f"{row['idea']:20} {row['tile']:>3} {row['seed']:>4} {far:>7} {row['total_density']:7.4f} "
            f"{row['ppl_ratio']:8.5f} {closed:>24} {needle:>7} {row['learning_seconds']:6.0f}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train-text", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ideas", nargs="+", choices=list(IDEAS)[1:], default=list(IDEAS)[1:])
    parser.add_argument("--tiles", type=int, nargs="+", default=[32])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.06])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--temperatures", type=float, nargs=2, default=(0.5, 0.1), metavar=("FIRST", "LAST"))
    parser.add_argument("--tf32", action="store_true", help="faster products while learning, on a GPU")
    parser.add_argument("--gumbel-steps", type=int, default=0, help="also train the preprint's router")
    parser.add_argument("--arities", type=int, nargs="+", default=[2], help="of the preprint's router")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--train-windows", type=int, default=150)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--needles", type=int, default=96)
    parser.add_argument("--needle-batch", type=int, default=8)
    parser.add_argument("--evaluation-seed", type=int, default=0)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--adapters", type=Path, help="folder to save every learned adapter to")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further idea later than this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()

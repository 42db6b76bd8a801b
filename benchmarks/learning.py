"""What learning is worth: each idea against the training-free default at equal measured executed far density.

    python -m benchmarks.learning MODEL --train-text DIR --text DIR --device cuda --tf32

An idea is learned once for each density and seed, in tiles of ``--learn-tile`` queries, and measured in all
``--tiles``. θ is moved until the far density executed on the measured windows is the one asked for, for the
default and for every idea alike. Without ``--text``, every fourth training document is kept for measuring:
that is where ideas are chosen. Rows go to ``--out`` as they are measured and are not measured again;
learning goes on from its checkpoints in ``--adapters``.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.csv_tables import merge, rows_of
from benchmarks.matching import Measured, gap_closed, losses_of, matched
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, config_of, operated, save_adapter
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.perplexity import Perplexity
from llama_surgery.files import write_json
from llama_surgery.learning.corrections import Corrections, scorer_parameters
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.trainer import Step, learn
from llama_surgery.text import read_texts, windows
from llama_surgery.topology.geometry import summary_density

RESULTS = Path(__file__).parent / "results" / "learning.csv"
GEOMETRY = ("chunk_size", "page_size", "window")
#: What identifies a row.
KEYS = (
    *(
        "model",
        "idea",
        "tile",
        "target",
        "length",
        "steps",
        "rate",
        "seed",
        "windows",
        "evaluation_seed",
        "text",
    ),
    *("train_text", "train_windows", "learn_tile", "learn_density", *GEOMETRY),
)
#: Name of an idea to the summary of unseen pages that it uses, and what is learned beside budgets; None for
#: nothing at all.
IDEAS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "default": ("page", None),
    "none": ("none", None),
    "budgets": ("page", ("summary",)),
    "channels": ("page", ("channels", "summary")),
    "channels+tree": ("page", ("channels", "tree", "summary")),
}
#: θ to begin the search for a density with, for tiles and for single rows; at 0.06 on the demo model.
FIRST_THETA = {True: 0.0105, False: 0.046}
#: Steps by which the time of one is measured, the first of them left out.
TRIAL_STEPS = 4


@dataclasses.dataclass
class Bench:
    """What all rows share."""

    options: argparse.Namespace
    model: torch.nn.Module
    tokenizer: object
    train: list[str]
    ids: torch.Tensor
    dense: Perplexity
    #: Of the default, by tile and target.
    defaults: dict[tuple[int, float], Measured]


def main() -> None:
    options = _parser().parse_args()
    torch.manual_seed(0)
    bench = _open(options)
    print(f"dense: perplexity {bench.dense.value:.4f}", flush=True)
    for target, tile in itertools.product(options.densities, options.tiles):
        _measure(bench, "default", tile, target, 0, None)
    learned: dict[tuple, _Learned] = {}
    for seed, target, idea in itertools.product(options.seeds, options.densities, options.ideas):
        wanted = [_key(bench, idea, tile, target, seed) for tile in options.tiles]
        rows = rows_of(options.out) if options.out.exists() else []
        if all(any(key.items() <= row.items() for row in rows) for key in wanted):
            continue
        at = options.learn_density or target
        if IDEAS[idea][1] is not None and (idea, at, seed) not in learned:
            learned[idea, at, seed] = _learned(bench, idea, at, seed)
        for tile in options.tiles:
            _measure(bench, idea, tile, target, seed, learned.get((idea, at, seed)))


def _open(options: argparse.Namespace) -> Bench:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    train = read_texts(options.train_text)
    if options.text is None:
        train, texts = [text for i, text in enumerate(train) if i % 4 != 3], train[3::4]
    else:
        texts = read_texts(options.text)
    ids = windows(tokenizer, texts, options.length, options.windows, options.evaluation_seed)
    dense = losses_of(model, ids, 1)
    return Bench(options, model, tokenizer, train, ids, dense, {})


@dataclasses.dataclass(frozen=True)
class _Learned:
    """Corrections, θ that they were learned with, and what the last step told."""

    corrections: Corrections
    theta: float
    last: dict
    seconds: float


def _learned(bench: Bench, idea: str, at: float, seed: int) -> _Learned:
    """Learn one idea at a density on training windows, in tiles of ``--learn-tile``."""
    options, last = bench.options, dict[str, Any]()
    summary, parts = IDEAS[idea]
    assert parts is not None
    length = options.length
    ids = windows(bench.tokenizer, bench.train, length, options.train_windows, 100 + seed)
    start = bench.defaults.get((options.learn_tile, at))
    config = _config(options, options.learn_tile, at) if start is None else start.config
    config = dataclasses.replace(config, summary=summary)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    begun = time.time()
    settings = LearningSettings(
        density=at,
        length=length,
        steps=options.steps,
        parts=parts,
        rate=options.rate,
        seed=seed,
    )
    file = told = None
    if options.adapters is not None:
        file = options.adapters / f"{idea}-{at}-{seed}" / "checkpoint-logits.pt"
        told = file.with_name("last-step.json")
        if file.exists() and told.exists():  # there may be no step left to tell of
            last = json.loads(told.read_text(encoding="utf-8"))
    settings = _within(bench, config, ids, settings, options.learn_seconds, file)

    def tell(step: Step) -> None:
        last.update(dataclasses.asdict(step))
        if told is not None:
            write_json(told, last)
        if step.step % max(1, settings.steps // 10) == 0:
            print(f"  {idea} {step}", flush=True)

    corrections = learn(
        bench.model, config, ids, settings, checkpoint_file=file, every_seconds=30, progress=tell
    )
    torch.set_float32_matmul_precision("highest")
    return _Learned(corrections, last.get("theta", config.theta), last, time.time() - begun)


def _within(
    bench: Bench,
    config: SurgeryConfig,
    ids: torch.Tensor,
    settings: LearningSettings,
    seconds: float,
    file: Path | None,
) -> LearningSettings:
    """The settings with as many steps as fit into ``seconds``, measured on a few, at most as asked for.

    A run that was begun keeps the number it was begun with.
    """
    if seconds == float("inf"):
        return settings
    if file is not None and file.exists():
        begun = torch.load(file, map_location="cpu", weights_only=True)["about"]["settings"]
        return dataclasses.replace(settings, steps=begun["steps"])
    times: list[float] = []
    trial = dataclasses.replace(settings, steps=TRIAL_STEPS)
    learn(bench.model, config, ids, trial, progress=lambda step: times.append(step.seconds))
    each = (times[-1] - times[0]) / (len(times) - 1)
    print(f"  {each:.2f} s a step", flush=True)
    return dataclasses.replace(settings, steps=max(1, min(settings.steps, int(seconds / each))))


def _measure(bench: Bench, idea: str, tile: int, target: float, seed: int, learned: _Learned | None) -> None:
    """Measure an idea in tiles of ``tile`` and keep its row."""
    options, key = bench.options, _key(bench, idea, tile, target, seed)
    config = dataclasses.replace(_config(options, tile, target), summary=IDEAS[idea][0])
    default = bench.defaults.get((tile, target))
    if default is not None:
        config = dataclasses.replace(default.config, summary=IDEAS[idea][0])
    if learned is not None and tile == options.learn_tile and options.learn_density in (None, target):
        config = dataclasses.replace(config, theta=learned.theta, theta_decode=None)
    routers = None if learned is None else scorer_parameters(learned.corrections)
    with operated(bench.model, config, routers=routers):
        measured = matched(bench.model, bench.ids, options.window_batch, target)
        if options.adapters is not None and learned is not None:
            save_adapter(bench.model, options.adapters / f"{idea}-{target}-{seed}" / f"tile-{tile}")
        config = config_of(bench.model)
    if idea == "default":
        bench.defaults[tile, target] = measured
        default = None
    read, ratio = measured.read, perplexity_ratio(bench.dense.per_window, measured.losses.per_window)
    row = key | {
        "theta": config.theta,
        "theta_decode": config.theta_decode,
        "far_density": read.far_density,
        "visible_far_density": read.visible_far_density,
        "total_density": read.near_density + read.far_density,
        "summary_density": summary_density(config, options.length),
        "ppl": measured.losses.value,
        "dense_ppl": bench.dense.value,
        "ppl_ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }
    first = None if target == options.densities[0] else bench.defaults.get((tile, options.densities[0]))
    for name, other in (("gap", default), ("first_gap", first)):
        closed = (other and gap_closed(bench.dense, other.losses, measured.losses)) or (None, None, None)
        row |= dict(zip((f"{name}_closed", f"{name}_low", f"{name}_high"), closed, strict=True))
    row |= {
        "steps_done": learned.last.get("step") if learned else None,
        "learning_seconds": round(learned.seconds, 1) if learned else None,
        "training_loss": learned.last.get("loss") if learned else None,
        "mass_lost": learned.last.get("mass_lost") if learned else None,
    }
    row |= {"torch": torch.__version__, "transformers": transformers.__version__}
    row |= {"device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()}
    merge(options.out, [row], None, KEYS)
    print(_line(row), flush=True)


def _config(options: argparse.Namespace, tile: int, target: float) -> SurgeryConfig:
    """The default topology for a tile. One executor for all rows, that of CPUs too."""
    given = {name: getattr(options, name) for name in GEOMETRY if getattr(options, name) is not None}
    theta = FIRST_THETA[tile == 1] * (0.06 / target) ** 0.8
    return SurgeryConfig(tile=tile, theta=theta, backend="gather", **given)


def _key(bench: Bench, idea: str, tile: int, target: float, seed: int) -> dict[str, str]:
    options, learned = bench.options, IDEAS[idea][1] is not None
    values: dict[str, object] = dict.fromkeys(KEYS, "")
    if learned:
        values |= {"train_text": options.train_text.name, "train_windows": options.train_windows}
        values |= {"learn_tile": options.learn_tile, "learn_density": options.learn_density or target}
    config = _config(options, tile, target)
    values |= {name: getattr(config, name) for name in GEOMETRY}
    values |= {
        "model": Path(options.model).name,
        "evaluation_seed": options.evaluation_seed,
        "idea": idea,
        "tile": tile,
        "target": target,
        "length": options.length,
        "steps": options.steps if learned else 0,
        "rate": options.rate if learned else 0,
        "seed": seed if learned else 0,
        "windows": options.windows,
        "text": "held-out" if options.text is None else options.text.name,
    }
    return {name: str(values[name]) for name in KEYS}


def _line(row: dict) -> str:
    names = ("idea", "tile", "target", "seed", "far_density", "ppl_ratio", "gap_closed", "first_gap_closed")
    values = [row.get(name) for name in names]
    return " ".join(f"{v:.5f}" if isinstance(v, float) else str(v or "-") for v in values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("--train-text", required=True, type=Path)
    add("--text", type=Path, help="every fourth training document if left out")
    add("--device", default="cpu")
    add("--ideas", nargs="+", choices=list(IDEAS)[1:], default=list(IDEAS)[1:])
    add("--tiles", type=int, nargs="+", default=[32])
    add("--learn-tile", type=int, default=32)
    add("--densities", type=float, nargs="+", default=[0.06])
    add("--learn-density", type=float, help="learn once, at this density, and measure at all")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=150, help="at most")
    add("--learn-seconds", type=float, default=float("inf"), help="as many steps of an idea as fit into this")
    add("--rate", type=float, default=0.03)
    add("--tf32", action="store_true", help="faster products while learning, on a GPU")
    add("--length", type=int, default=8192)
    add("--train-windows", type=int, default=150)
    add("--windows", type=int, default=24)
    add("--window-batch", type=int, default=8, help="windows of an operated model measured together")
    add("--evaluation-seed", type=int, default=0)
    for name in GEOMETRY:
        add(f"--{name.replace('_', '-')}", type=int)
    add("--adapters", type=Path, help="folder for checkpoints and every learned adapter")
    add("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()

"""Does a topology need re-deriving for every kind of text? Learned on each domain, measured on all of them.

    python -m benchmarks.transfer MODEL --domain books TRAIN VAL --domain python DIR --device cuda

A domain is a name and a folder of texts, every second of them kept for measuring, or a folder to learn on and
another to measure on. On the measured windows of every domain, the same for all: the dense model, the
training-free default, and the corrections learned on every domain. Each is measured with θ moved until the
executed far density is ``--density`` and, where θ or corrections come from another domain, first with that
domain's θ as it is. Rows go to ``--out`` as they are measured.
"""

import argparse
import dataclasses
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from benchmarks.learning import FIRST_THETA, IDEAS
from benchmarks.matching import FIRST_SLOPE, Measured, gap_closed, losses_of, matched
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, operated, reset_statistics, statistics
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.perplexity import Perplexity
from llama_surgery.files import write_csv
from llama_surgery.learning.attach import Gates, gates_in
from llama_surgery.learning.corrections import Corrections, scorer_parameters
from llama_surgery.learning.gates import Homotopy
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.trainer import fresh_corrections, learn
from llama_surgery.surgery.metric import metric_of
from llama_surgery.surgery.operation import set_config
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "transfer.csv"


@dataclasses.dataclass
class Domain:
    """One kind of text: windows to learn on, windows to measure on, and the dense model on the latter."""

    learn: torch.Tensor
    test: torch.Tensor
    dense: Perplexity


@dataclasses.dataclass(frozen=True)
class Corrected:
    """What is measured on every domain; ``learned_on`` is None where nothing was learned."""

    idea: str
    summary: str
    corrections: Corrections
    learned_on: str | None = None
    seconds: float | None = None


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.time()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model = model.to(options.device).eval()
        self.domains = {name: self._domain(tokenizer, *folders) for name, *folders in options.domain}
        self.defaults: dict[str, Measured] = {}
        self.rows: list[dict] = []

    def _domain(self, tokenizer: object, first: str, second: str | None = None) -> Domain:
        options, texts = self.options, read_texts(first)
        kept = texts[1::2] if second is None else read_texts(second)
        texts = texts[::2] if second is None else texts
        learn = windows(tokenizer, texts, options.length, options.train_windows, 100 + options.seed)
        test = windows(tokenizer, kept, options.length, options.windows, 0)
        return Domain(learn, test, losses_of(self.model, test, 1))

    def learned(self, name: str) -> Corrected:
        """Corrections learned on one domain."""
        options = self.options
        summary, parts = IDEAS[options.idea]
        settings = LearningSettings(
            density=options.density,
            length=options.length,
            steps=options.steps,
            parts=parts,
            seed=options.seed,
        )
        config = dataclasses.replace(self.defaults[name].config, summary=summary)
        file, begun = None, time.time()
        if options.checkpoints is not None:
            file = options.checkpoints / f"{name}-{options.seed}.pt"
        corrections = learn(
            self.model,
            config,
            self.domains[name].learn,
            settings,
            checkpoint_file=file,
            progress=lambda step: print(f"  {name} {step}", flush=True),
        )
        return Corrected(options.idea, summary, corrections, name, round(time.time() - begun, 1))

    def measure(self, what: Corrected, name: str, theta: float, theta_of: str) -> float:
        """Rows of ``what`` on one domain; begins with ``theta``, the θ of domain ``theta_of``.

        Returns:
            θ of this domain: at which its windows have the density asked for.
        """
        options, domain = self.options, self.domains[name]
        given = {key: getattr(options, key) for key in ("chunk_size", "page_size", "window")}
        given = {key: value for key, value in given.items() if value is not None}
        config = SurgeryConfig(
            tile=options.tile, theta=theta, summary=what.summary, backend="gather", **given
        )
        routers = None if what.learned_on is None else scorer_parameters(what.corrections)
        with operated(self.model, config, routers=routers):
            if theta_of != name:
                reset_statistics(self.model)
                losses = losses_of(self.model, domain.test, options.window_batch)
                carried = Measured(losses, statistics(self.model), config)
                theta *= (options.density / carried.read.far_density) ** FIRST_SLOPE
                decode = theta if options.tile == 1 else config.theta_decode
                set_config(self.model, dataclasses.replace(config, theta=theta, theta_decode=decode))
            found = matched(self.model, domain.test, options.window_batch, options.density)
        if what.idea == "default":
            self.defaults[name] = found
        if theta_of != name:
            self._keep(what, name, theta_of, carried)
        self._keep(what, name, name, found)
        return found.config.theta

    def _keep(self, what: Corrected, name: str, theta_of: str, measured: Measured) -> None:
        options, domain, read = self.options, self.domains[name], measured.read
        ratio = perplexity_ratio(domain.dense.per_window, measured.losses.per_window)
        closed = (None, None, None)
        if measured is not self.defaults[name]:
            closed = gap_closed(domain.dense, self.defaults[name].losses, measured.losses)
        row = {"idea": what.idea, "learned_on": what.learned_on, "tested_on": name, "theta_of": theta_of}
        row |= {"theta": measured.config.theta, "far_density": read.far_density}
        row |= {"total_density": read.near_density + read.far_density, "dense_ppl": domain.dense.value}
        row |= {"ppl": measured.losses.value, "ppl_ratio": ratio.ratio}
        row |= {"ratio_low": ratio.low, "ratio_high": ratio.high}
        row |= dict(zip(("gap_closed", "gap_low", "gap_high"), closed, strict=True))
        row |= {"mass_lost": self._mass_lost(what, name, measured.config), "learning_seconds": what.seconds}
        row |= {"steps": options.steps if what.learned_on else 0, "seed": options.seed}
        row |= {key: getattr(options, key) for key in ("length", "windows", "mass_windows")}
        row |= {key: getattr(measured.config, key) for key in ("tile", "chunk_size", "page_size", "window")}
        row |= {"model": Path(options.model).name, "torch": torch.__version__}
        row |= {"device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()}
        self.rows.append(row | {"transformers": transformers.__version__})
        write_csv(options.out, self.rows)
        print(
            f"{what.idea} learned on {what.learned_on} tested on {name} θ of {theta_of} far "
            f"{read.far_density:.4f} ratio {ratio.ratio:.5f} closed {closed} lost {row['mass_lost']:.4f} "
            f"{time.time() - self.started:.0f} s",
            flush=True,
        )

    @torch.no_grad()
    def _mass_lost(self, what: Corrected, name: str, config: SurgeryConfig) -> float:
        """Share of attention on far pages that rows do not see, as the page scores in use expect it."""
        gates = Gates(what.corrections, config, math.log(config.theta), Homotopy(1.0, 0.0), "gated")
        with gates_in(self.model, gates):
            for window in self.domains[name].test[: self.options.mass_windows]:
                self.model(window[None].to(self.model.device), use_cache=False, logits_to_keep=1)
        return gates.reading.mass_lost()


def main() -> None:
    options = _parser().parse_args()
    torch.manual_seed(0)
    bench = Bench(options)
    names = list(bench.domains)
    inner = inner_model(bench.model)
    settings = LearningSettings(density=options.density, parts=())
    fresh = fresh_corrections(inner, settings, metric_of(inner)).to(options.device)
    thetas = {}
    for name in names:
        first = thetas.get(names[0], options.theta)
        thetas[name] = bench.measure(Corrected("default", IDEAS["default"][0], fresh), name, first, names[0])
    for origin in options.learn_on or names:
        learned, theta = bench.learned(origin), thetas[origin]
        for name in sorted(names, key=lambda other: other != origin):  # its own first: that sets its θ
            found = bench.measure(learned, name, theta, origin)
            theta = found if name == origin else theta


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("--domain", nargs="+", action="append", required=True, metavar=("NAME", "DIR"), help="repeat it")
    add("--learn-on", nargs="+", help="names of the domains to learn on; all of them if left out")
    learned = [name for name, (_, parts) in IDEAS.items() if parts is not None]
    add("--idea", choices=learned, default="channels")
    add("--tile", type=int, default=64)
    add("--density", type=float, default=0.06, help="executed far density")
    add("--theta", type=float, default=FIRST_THETA[False], help="to begin the search of the first with")
    add("--steps", type=int, default=150)
    add("--length", type=int, default=8192)
    add("--windows", type=int, default=24)
    add("--train-windows", type=int, default=30)
    add("--mass-windows", type=int, default=2, help="of the measured ones, for the mass lost")
    add("--window-batch", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--chunk-size", type=int)
    add("--page-size", type=int)
    add("--window", type=int)
    add("--device", default="cpu")
    add("--checkpoints", type=Path, help="folder for checkpoints of learning, from which it goes on")
    add("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()

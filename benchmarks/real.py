"""What a real model loses when it is operated: perplexity, planted facts and RULER on the same samples.

    python benchmarks/real.py MODEL --text books-val --device cuda --deadline 560
    python benchmarks/real.py --table      # the CSV of all that was measured so far
    python benchmarks/real.py --check      # the same against the targets

MODEL is the folder of a checkpoint or a GGUF file. These forms of it are measured on the same samples: dense;
dense in another rounding, which shows the noise of all other figures; operated, with decode steps that read
everything and with decode steps that read pages; and two oracles at the operated model's total density, which
know the true attention of every key or of every block. `--form one-theta` measures the operated model with
one threshold for all heads instead of budgets by head. Without --calibration-text every other document of a
text is for calibration.

Every result is kept in --out as soon as it is there. The same command goes on where the last one stopped;
with larger --windows, --needles or --ruler-samples it adds to what is there. Several processes may share the
folder if they measure different forms. Results of another state of the code belong in another folder.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

from csv_tables import RESULTS
from real_forms import DECODES, DTYPE, ONE_THETA, ROUNDINGS, Form, Maker
from real_measure import Measure
from real_model import RealModel, name_of, real_model, study_folder, text_name
from real_results import FORMS, NEEDLE, RULER, WINDOW, Results, canonical, studies
from real_samples import RULER_TASKS, Samples, split
from real_table import check, measured, ruler_of_all, update

from llama_surgery.cli.common import load_tokenizer
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.kept import claimed, digest
from llama_surgery.surgery.context import context_length

#: A run that is cut short has measured all forms on about the same samples: they take turns.
ROUNDS = 8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint folder or GGUF file")
    add("--text", type=Path, nargs="+", metavar="FOLDER", help="documents to measure on; each is a row")
    add("--calibration-text", type=Path, metavar="FOLDER")
    add("--length", type=int, nargs="+", default=[8192], help="tokens of windows and of prompts")
    add("--windows", type=int, default=16)
    add("--needles", type=int, default=400)
    add("--ruler-samples", type=int, default=25, help="of each task")
    add("--task", nargs="+", choices=RULER_TASKS, default=list(RULER_TASKS))
    add("--form", nargs="+", choices=FORMS, default=[name for name in FORMS if name != ONE_THETA])
    add("--density", type=float, default=0.06, help="executed far density that θ is calibrated to")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of SurgeryConfig")
    add("--adapter", type=Path, help="folder of learned corrections")
    add("--decode", nargs="+", choices=DECODES, default=list(DECODES))
    add("--rounding", choices=ROUNDINGS, help="float32 unless given, bfloat16 where --dtype is that")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=DTYPE)
    add("--device", default="auto")
    add("--batch", type=int, default=8, help="prompts that are answered together")
    add("--chat", action=argparse.BooleanOptionalAction, help="RULER in the chat template, if there is one")
    add("--seed", type=int, default=0)
    add("--deadline", type=float, default=math.inf, metavar="SECONDS", help="begin nothing new after these")
    add("--out", type=Path, default=Path("out/real"), metavar="FOLDER", help="raw results")
    add("--csv", type=Path, default=RESULTS / "real_quality.csv")
    add("--prepare", action="store_true", help="only make the samples, which needs no GPU")
    add("--table", action="store_true", help="measure nothing")
    add("--check", action="store_true", help="measure nothing; fail where a target is missed")
    given = parser.parse_args()
    if not (given.table or given.check) and not (given.model and given.text):
        parser.error("MODEL and --text are needed, or --table or --check")
    if min(given.windows, given.needles, given.ruler_samples, given.batch - 1) < 0:
        parser.error("--windows, --needles and --ruler-samples are at least 0, --batch 1")
    return given


class Run:
    """One process: a model, whose forms are measured on one study after the other.

    Args:
        given: The command line.
        until: ``time.monotonic()`` after which nothing is begun.
    """

    def __init__(self, given: argparse.Namespace, until: float) -> None:
        self._given, self._until, self._began = given, until, time.monotonic()
        self._name = name_of(given.model)
        self._real: RealModel | None = None
        if given.prepare:
            self._tokenizer = load_tokenizer(given.model)
            return
        self._real = real_model(given.model, given.device, given.dtype, given.adapter, given.set)
        self._tokenizer = self._real.tokenizer
        self._tell(f"{self._name} loaded")

    @property
    def over(self) -> bool:
        return time.monotonic() > self._until

    def study(self, text: Path, length: int) -> None:
        """Measures what is missing at a length on a text."""
        given = self._given
        calibration, texts = split(text, given.calibration_text)
        chat = bool(self._tokenizer.chat_template) if given.chat is None else given.chat
        settings = {
            **{"model": self._name, "length": length, "text": text_name(text), "dtype": given.dtype},
            **{"seed": given.seed, "chat": chat},
            **{"measured_on": digest(*texts), "calibrated_on": digest(*calibration)},
        }
        folder = study_folder(given.out, self._name, length, text)
        results = Results(folder, settings)
        samples = Samples(
            self._tokenizer, texts, length=length, seed=given.seed, chat=chat, folder=folder / "samples"
        )
        if (real := self._real) is None:
            self._prepare(samples)
            return
        context = context_length(real.model)
        if context is not None and length > context:
            raise SurgeryError(
                f"{length} tokens: {self._name} was made for {context}. Leave that length out."
            )
        maker = Maker(
            real.model,
            real.tokenizer,
            calibration,
            length=length,
            density=given.density,
            config=real.config,
            given=list(real.by_hand),
            routers=real.routers,
            dtype=given.dtype,
            rounding=given.rounding or ("bfloat16" if given.dtype == "float32" else "float32"),
            folder=folder,
        )
        if self.over:
            return
        measure = Measure(real.model, samples, results, given.windows, given.batch)
        forms: dict[str, list[Form]] = {}
        for turn in range(1, ROUNDS + 1):
            for name in FORMS:
                if name not in given.form:
                    continue
                if name not in forms:
                    forms[name] = maker.make(name, given.decode)
                for form in forms[name]:
                    results.begin(form.name, form.settings)
                    count = 0
                    for found in measure.missing(form, self._wanted(turn)):
                        count += found
                        if self.over:
                            break
                    if count:
                        what = f"{count} results of {form.name} {canonical(form.settings)}"
                        self._tell(f"turn {turn} of {ROUNDS}: {what}")
                    if self.over:
                        return

    def _wanted(self, turn: int) -> list[str]:
        """Items that are there after so many turns."""
        given = self._given

        def first(count: int) -> range:
            return range(math.ceil(count * turn / ROUNDS))

        return [
            *(f"{WINDOW} {number}" for number in first(given.windows)),
            *(f"{NEEDLE} {number}" for number in first(given.needles)),
            *(f"{RULER} {task} {number}" for task in given.task for number in first(given.ruler_samples)),
        ]

    def _prepare(self, samples: Samples) -> None:
        for item in self._wanted(ROUNDS):
            kind, *which = item.split()
            if kind == NEEDLE:
                samples.needle(int(which[0]))
            elif kind == RULER:
                samples.ruler(which[0], int(which[1]))
        self._tell("samples made")

    def _tell(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {what}", flush=True)


def table(given: argparse.Namespace) -> None:
    """Writes the rows of all studies, and shows them."""
    with claimed(given.out, "table", wait=True):
        rows = []
        for results in studies(given.out):
            print(f"\n{results.title}")
            for found in measured(results):
                rows.append(found.row())
                print(f"  {found.told()}")
        update(given.csv, rows)


def targets(given: argparse.Namespace) -> bool:
    """Shows what every operated model meets and misses. Returns whether there is one and all is met."""
    met, operated = [], []
    for results in studies(given.out):
        for found in measured(results):
            if found.form == "operated":
                operated.append(found)
                print(f"\n{results.title}: {canonical(found.settings)}")
                for good, told in check(found):
                    print(f"  {'met' if good else 'MISSED'}  {told}")
                    met.append(good)
    if (together := ruler_of_all(operated)) is not None:
        print(f"\n{together}")
    return bool(met) and all(met)


def main() -> int:
    given = options()
    try:
        if given.check:
            return 0 if targets(given) else 1
        if not given.table:
            run = Run(given, time.monotonic() + given.deadline)
            for text, length in itertools.product(given.text, given.length):
                run.study(text, length)
        if not given.prepare:
            table(given)
    except SurgeryError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

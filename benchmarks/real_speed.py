"""How fast a real model is when it is operated: first token and decode step on real text, dense beside it.

    python benchmarks/real_speed.py MODEL --text books-val --lengths 1k 4k 8k --device cuda --seconds 60

MODEL is the folder of a checkpoint or a GGUF file. It is operated once, with the defaults calibrated to
--density on every other document of the text (or with --theta, or as an --adapter has it), dense below the
position that operate() finds by times of whole prompts, and reads windows of the other documents. The dense
side has the same weights, a preallocated cache and the fastest backend of PyTorch's SDPA for the very shapes.
Sides take turns, and medians over turns are kept. Before that, with everything open, the operated model's
logits must be the dense model's but for rounding.

Rows go to --out as soon as they are there, beside what the same thresholds lose by real_quality.csv where no
row is dense. The same command goes on where the last one stopped; --again measures anew.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from csv_tables import RESULTS, rows_of
from real_forms import DTYPE, OPERATED, Form, Maker
from real_model import real_model, study_folder, text_name
from real_results import canonical
from real_samples import split
from real_speed_table import COLUMNS, FILE, KEYS, measured, quality_of, update
from timing import model as models
from timing.in_turns import InTurns, Turns, twin
from timing.measure import Deadline, environment, say
from timing.parts import GRAPHED, PARTS

from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.surgery.calibrate import calibration_windows
from llama_surgery.surgery.context import USUAL_LENGTH, context_length
from llama_surgery.surgery.operation import config_of, set_config
from llama_surgery.surgery.pays import usual_dense_until
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import parse_length, windows

#: Far density of θ where nothing else is given, and tokens of the prompt of the check.
DENSITY, CHECKED = 0.06, 2048


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", help="checkpoint folder or GGUF file")
    add("--text", type=Path, required=True, metavar="FOLDER", help="documents; their name is a row's text")
    add("--calibration-text", type=Path, metavar="FOLDER")
    add("--lengths", nargs="+", default=["1k", "4k", "8k", "32k"], help="tokens of prompts, as 8192 or 8k")
    setting = parser.add_mutually_exclusive_group()
    setting.add_argument("--density", type=float, help=f"far density that θ is calibrated to, {DENSITY}")
    setting.add_argument("--theta", type=float, help="calibrate nothing")
    setting.add_argument("--adapter", type=Path, metavar="FOLDER", help="its θ and corrections instead")
    add("--calibration-length", metavar="TOKENS", help="of a window; the longest prompt's, at most 8k")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of SurgeryConfig")
    add("--dense-until", type=int, help="position; as operate() sets it if left out")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=DTYPE)
    add("--device", default="auto")
    add("--seconds", type=float, default=600.0, help="begin no part after these")
    add("--seed", type=int, default=0)
    add("--kept", type=Path, default=Path("out/real"), metavar="FOLDER", help="θ found, as real.py keeps it")
    add("--quality", type=Path, default=RESULTS / "real_quality.csv")
    add("--out", type=Path, default=FILE)
    add("--again", action="store_true", help="measure what the file has too")
    return parser.parse_args()


class Run:
    """A model at all its lengths.

    Args:
        given: The command line.
        deadline: No part begins after it.
    """

    def __init__(self, given: argparse.Namespace, deadline: Deadline) -> None:
        self._given, self._deadline = given, deadline
        fields = [*given.set, *([] if given.theta is None else [f"theta={given.theta}"])]
        self._real = real_model(given.model, given.device, given.dtype, given.adapter, fields)
        models.check_layers(inner_model(self._real.model), self._real.name)
        calibration, self._texts = split(given.text, given.calibration_text)
        self._text = text_name(given.text)
        self._quality = rows_of(given.quality) if given.quality.exists() else []
        self._density = DENSITY if given.density is None else given.density
        if given.theta is not None or given.adapter is not None:
            self._density = None
        self._prompts = self._read()
        say(f"{self._real.name}: prompts of {', '.join(map(str, self._prompts))} tokens")
        self._calibration = calibration

    def _read(self) -> dict[int, torch.Tensor]:
        """Prompts (1, length) of the lengths that model and text have."""
        prompts, context = {}, context_length(self._real.model)
        for length in map(parse_length, self._given.lengths):
            if context is not None and length > context:
                say(f"{length:,} tokens are left out: {self._real.name} was made for {context:,}")
                continue
            try:
                prompts[length] = self._window(length)
            except TextError as error:
                say(f"{length:,} tokens are left out: {error}")
        if not prompts:
            raise SurgeryError("no length is left: ask for shorter ones with --lengths, or give longer text.")
        return prompts

    def _window(self, length: int) -> torch.Tensor:
        found = windows(self._real.tokenizer, self._texts, length, 1, self._given.seed)
        return found.to(inner_model(self._real.model).device)

    def measure(self) -> None:
        """Measures what is missing."""
        given, real, longest = self._given, self._real, max(self._prompts)
        length = min(longest, USUAL_LENGTH)
        if given.calibration_length is not None:
            length = parse_length(given.calibration_length)
        form = self._form(length)
        say(f"{canonical(form.settings)}, {self._deadline.spent:.0f} s")
        inner = inner_model(real.model)
        if self._deadline.passed("the check"):
            return
        ids = self._window(min(CHECKED, longest) + models.STEPS)
        error, own = models.check_against_dense(inner, real.config, ids, real.routers)
        say(f"everything open, logits differ by {error:.2e}, of two dense backends {own:.2e}")
        rival = twin(inner)
        with form.running() as read:
            self._set_dense_until(length)
            missing = self._missing(canonical(form.settings))
            for index, (n, parts) in enumerate(missing):
                if self._deadline.passed(f"{n:,} tokens"):
                    break
                left = sum(len(parts) for _, parts in missing[index:])
                self._length(n, parts, left, InTurns(inner, rival, self._prompts[n], read), form)

    def _missing(self, settings: str) -> list[tuple[int, list[str]]]:
        """Lengths and parts that the CSV has not."""
        given, real = self._given, self._real
        until = config_of(real.model).dense_until
        wanted = {"settings": settings, "dense_until": until, "model": real.name, "text": self._text}
        where = environment(inner_model(real.model).device)
        wanted |= {name: where[name] for name in KEYS if name in where}
        has = set() if given.again else measured(given.out, wanted)
        cuda = inner_model(real.model).device.type == "cuda"
        possible = [part for part in PARTS if cuda or part != GRAPHED]
        missing = [(n, [part for part in possible if (n, part) not in has]) for n in self._prompts]
        return [(n, parts) for n, parts in missing if parts]

    def _set_dense_until(self, length: int) -> None:
        """As operate() does by itself, unless it is given."""
        real, until = self._real, self._given.dense_until
        inner = inner_model(real.model)
        if until is None:
            ids = calibration_windows(real.model, real.tokenizer, self._calibration, length, real.config)
            until = usual_dense_until(inner, ids)
        if until is not None:
            set_config(real.model, dataclasses.replace(config_of(real.model), dense_until=until))
        say(f"dense below position {config_of(real.model).dense_until:,}, {self._deadline.spent:.0f} s")

    def _form(self, length: int) -> Form:
        """The operated model, calibrated where that was asked for."""
        given, real = self._given, self._real
        by_hand = list(real.by_hand)
        if given.adapter is not None:
            by_hand += ["theta", "theta_decode"] if real.config.theta_decode else ["theta"]
        maker = Maker(
            real.model,
            real.tokenizer,
            self._calibration,
            length=length,
            density=self._density or DENSITY,
            config=real.config,
            given=by_hand,
            routers=real.routers,
            dtype=given.dtype,
            rounding=given.dtype,
            folder=study_folder(given.kept, real.name, length, given.text),
        )
        return maker.make(OPERATED, ["dense"])[0]

    def _length(self, length: int, parts: list[str], left: int, turns: InTurns, form: Form) -> None:
        """One prompt. Time that is left is shared out among the parts that are."""

        def seconds() -> float:
            return max(0.0, self._deadline.seconds - self._deadline.spent) / max(1, left)

        for found in turns.measure(parts, seconds):
            left -= 1
            self._add(length, found, form)

    def _add(self, length: int, found: Turns, form: Form) -> None:
        real, name = self._real, self._real.name
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"model": name, "length": length, "text": self._text, "settings": canonical(form.settings)}
        row |= {name: value for name, value in found._asdict().items() if name in COLUMNS}
        row |= {f"{what}_density": value for what, value in found.densities.items()}
        row |= {"speedup": found.rival_ms / found.ms, "dense_until": config_of(real.model).dense_until}
        quality = quality_of(self._quality, name, length, self._text, form.settings, self._density)
        if quality is not None:
            row |= {f"quality_{what}": quality[what] for what in ("model", "length", "settings")}
            row["ratio_quality"] = quality["ratio"]
        row = {name: _rounded(value) for name, value in row.items()}
        row |= environment(inner_model(real.model).device)
        update(self._given.out, [row])
        say(
            f"{length:,} tokens, {found.part}: {found.ms:.4g} ms, {found.rival} {found.rival_ms:.4g} ms, "
            f"{found.rival_ms / found.ms:.2f} ×, {found.alternations} turns, {self._deadline.spent:.0f} s"
        )


def _rounded(value: Any) -> Any:
    """Numbers to five digits, and None for what is not known."""
    if not isinstance(value, float):
        return value
    return None if value != value else float(f"{value:.5g}") if value < 1e6 else round(value)


def main() -> int:
    given = options()
    try:
        Run(given, Deadline(given.seconds)).measure()
    except SurgeryError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""This package's topology and published rules against dense, at several densities, on the same samples."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.compare_forms import Form, PagesForm, PeerForm, densities_between, row
from llama_surgery.evaluation.evaluate import check_dense, environment, model_name, named_progress
from llama_surgery.evaluation.kept import Kept, adapter_digest, digest
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.needle_facts import VARIANTS
from llama_surgery.evaluation.peers.registry import PEERS
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.evaluation.result import DENSE
from llama_surgery.surgery.context import check_vocabulary
from llama_surgery.surgery.progress import Progress
from llama_surgery.text import windows as cut_windows
from llama_surgery.topology.router import PageRouter

#: Names of this package's own forms: the configured topology, and that of an adapter.
PAGES, LEARNED = "pages", "learned"
#: Everything that can be compared, in order of tables.
FORMS = (DENSE, PAGES, LEARNED, *PEERS)
#: Total densities that every form is asked for, if its floor allows, and the one that is measured first.
DENSITIES, FIRST = (0.05, 0.1, 0.18, 0.3, 0.5), 0.18
#: Perplexity windows, unless others are asked for.
WINDOWS = 24
#: Calibration windows that densities are measured on; most, for rules that learn, and fewest.
CALIBRATION_WINDOWS, TRAINING_WINDOWS, FEWEST_WINDOWS = 2, 16, 2


class Comparison:
    """Forms of one model at several total densities; what is finished is kept.

    Arguments that are not named here are those of :func:`~llama_surgery.evaluation.evaluate.evaluate`.

    Args:
        kept: Where what is finished is kept.
        texts: Documents that nothing was tuned on.
        calibration: Other documents, for knobs, thresholds and rules that learn.
        config: This package's topology; thresholds are set for each density.
        windows: Perplexity windows; 24, or as many as the texts hold, if None.
        needle_lengths: Of prompts; one that is named twice is given to twice as many.
        rules: Names of :data:`FORMS` that are compared with dense; all that there are if None.
        densities: Total densities wanted of every form.
        adapter: Configuration and learned corrections of an adapter, which becomes the form ``learned``; its
            thresholds are set for each density.
        seed: Of windows, prompts and learning.

    Raises:
        SurgeryError: The model is operated or in training mode, or a form or density does not exist.
        TextError: The texts are too short.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        kept: Kept,
        *,
        texts: Sequence[str],
        calibration: Sequence[str],
        config: SurgeryConfig,
        length: int,
        windows: int | None,
        needles: int,
        needle_lengths: Sequence[int],
        needle_variants: Sequence[str] = tuple(VARIANTS),
        needle_batch: int = 8,
        rules: Sequence[str] | None = None,
        densities: Sequence[float] = DENSITIES,
        adapter: tuple[SurgeryConfig, Mapping[int, PageRouter]] | None = None,
        seed: int = 0,
    ) -> None:
        check_dense(model, {})
        if not densities or not all(0 < density < 1 for density in densities):
            raise SurgeryError(f"densities {list(densities)}: give total densities between 0 and 1.")
        there = [name for name in FORMS if name != LEARNED or adapter is not None]
        unknown = [name for name in rules or [] if name not in there]
        if unknown:
            wanting = " 'learned' needs an adapter." if LEARNED in unknown else ""
            raise SurgeryError(f"rules {', '.join(unknown)}: there are {', '.join(there)}.{wanting}")
        self._model, self._kept, self._batch, self._densities = model, kept, needle_batch, list(densities)
        self._ids = cut_windows(tokenizer, texts, length, windows, seed, usual=WINDOWS)
        check_vocabulary(model, self._ids)
        self._head = Head(model, self._ids[0])
        self._prompts = needle_prompts(
            tokenizer, texts, count=needles, lengths=needle_lengths, variants=needle_variants, seed=seed
        )
        training = _calibration_windows(tokenizer, calibration, length, seed)
        few = training[:CALIBRATION_WINDOWS]
        self._topologies: dict[str, Any] = {PAGES: (config, None)}
        if adapter is not None:
            self._topologies[LEARNED] = adapter

        def made(name: str) -> Form:
            if name in self._topologies:
                topology, routers = self._topologies[name]
                title = f"pages, tile {topology.tile}{', learned' * (name == LEARNED)} (this package)"
                given = {"routers": routers, "tokenizer": tokenizer, "texts": calibration}
                return PagesForm(name, title, config=topology, model=model, ids=few, **given)
            if name == DENSE:
                return Form()
            peer = PEERS[name]
            return PeerForm(name, peer.title, peer.ahead, peer=peer, model=model, ids=few, training=training)

        self._forms = {name: made(name) for name in there if rules is None or name in (DENSE, *rules)}
        machine = environment(model)
        self._device = machine.pop("device"), machine.pop("threads")
        self.settings = {
            "model": model_name(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            **machine,
            "length": length,
            "windows": len(self._ids),
            "needles": needles,
            "needle_lengths": list(needle_lengths),
            "needle_variants": list(needle_variants),
            "seed": seed,
            "text": digest(*texts),
            "calibration_text": digest(*calibration),
        }

    def run(self, deadline: float | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Measures what is not there yet: every form at its first density, then at its second, and so on.

        Processes that share a folder leave each other what one of them is measuring.

        Args:
            deadline: ``time.monotonic()`` after which nothing further is begun.
            progress: Told as ``progress(stage, done, total)``.

        Returns:
            Plain values, ready for JSON: ``settings``, ``floors`` (smallest total density by form), ``rows``,
            the dense model's first (:func:`~llama_surgery.evaluation.compare_forms.row`), and
            ``unfinished``, forms of which something is missing.

        Raises:
            SurgeryError: A loss is not finite, memory is too small, or the dense model was not measured.
        """
        budgets: dict[str, dict[str, Any]] = {}
        cells: dict[tuple[str, float], dict[str, Any]] = {}
        turn, left = 0, True
        while left:
            left = False
            for name, form in self._forms.items():
                late = deadline is not None and time.monotonic() > deadline
                if turn == 0:
                    budgets[name] = self._budget(form, late) or {"floor": 1.0, "targets": []}
                targets = budgets[name]["targets"]
                if turn < len(targets):
                    left, target = True, targets[turn]
                    if (cell := self._cell(form, target, late, progress)) is not None:
                        cells[name, target] = cell
            turn += 1
        wanted = {name: {(name, target) for target in own["targets"]} for name, own in budgets.items()}
        unfinished = [name for name, own in wanted.items() if not own or own - cells.keys()]
        dense = cells.get((DENSE, 1.0))
        if dense is None:
            raise SurgeryError("the dense model is not measured yet, so that nothing can be compared.")
        return {
            "settings": self.settings,
            "floors": {name: own["floor"] for name, own in budgets.items() if own["floor"] < 1},
            "rows": [
                row(self._forms[name], budgets[name]["floor"], target, cells[name, target], dense,
                     self._prompts, self.settings)
                for name, target in sorted(cells, key=lambda key: (FORMS.index(key[0]), key[1]))
            ],
            "unfinished": unfinished,
        }  # fmt: skip

    def _decides(self, form: Form) -> dict[str, Any]:
        topology = self._topologies.get(form.name)
        return {**self.settings, "form": form.name, "topology": topology and adapter_digest(*topology)}

    def _budget(self, form: Form, late: bool) -> dict[str, Any] | None:
        """``floor`` and ``targets`` of a form, the one to measure first in front."""

        def made() -> dict[str, Any]:
            floor, targets = form.floor(), [1.0]
            if floor < 1:
                targets = densities_between(floor, self._densities)
                targets.sort(key=lambda target: abs(math.log(target / FIRST)))
                if form.name in self._topologies:
                    targets.append(1.0)  # the check that a full budget is dense
            return {"floor": floor, "targets": targets}

        decides = {**self._decides(form), "densities": self._densities}
        return self._kept.once("densities", None if late else made, **decides)

    def _cell(
        self, form: Form, target: float, late: bool, progress: Progress | None
    ) -> dict[str, Any] | None:
        """A form at a density, unless another process is at it."""

        def made() -> dict[str, Any]:
            tell, began = named_progress(progress, f"{form.name} at {target:.3f}"), time.perf_counter()
            if tell is not None:
                tell("calibration", 0, 1)
            setting = form.setting(target)
            if tell is not None:
                tell("calibration", 1, 1)
            try:
                with form.running(setting) as reading:
                    losses = perplexity(self._model, self._ids, tell, head=self._head).per_window
                with form.running(setting) as answering:
                    answers = score_needles(self._model, self._prompts, self._batch, tell)
            except torch.OutOfMemoryError as error:
                raise SurgeryError(
                    f"out of memory with {form.name} at {target:.3g}: answer fewer prompts together. What is "
                    "finished is kept."
                ) from error
            return {
                "setting": setting,
                "per_window": losses,
                "density": reading["prefill"],
                "answers": answers,
                "answering": answering,
                "seconds": time.perf_counter() - began,
                "device": self._device[0],
            }

        decides = {**self._decides(form), "target": target}
        return self._kept.once("cell", None if late else made, wait=form.name == DENSE, **decides)


def _calibration_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int
) -> torch.Tensor:
    """As many windows as the texts hold, in powers of two."""
    count = TRAINING_WINDOWS
    while True:
        try:
            return cut_windows(tokenizer, texts, length, count, seed)
        except TextError:
            if count <= FEWEST_WINDOWS:
                raise
            count //= 2

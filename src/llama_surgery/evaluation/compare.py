"""Every form of a model at every density on every task, in cells that are measured once."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.compare_budgets import (
    Budgets,
    adapter_digest,
    claimed,
    read_budgets,
    targets_of,
)
from llama_surgery.evaluation.compare_forms import DenseForm, Form, FullForm, PagesForm, PeerForm
from llama_surgery.evaluation.compare_samples import digest, make_samples
from llama_surgery.evaluation.evaluate import check_dense, environment, model_name, named_progress
from llama_surgery.evaluation.io import Progress, read_started
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.needle import NeedlePrompt, score_needles
from llama_surgery.evaluation.needle_variants import VARIANTS
from llama_surgery.evaluation.peers.registry import PEERS
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.files import write_json
from llama_surgery.folders import check_folder
from llama_surgery.topology.router import PageRouter

#: Names of this package's own forms: the configured topology, and that of an adapter.
PAGES, LEARNED = "pages", "learned"
#: Everything that can be compared, in order of tables.
FORMS = ("dense", PAGES, LEARNED, *PEERS, "full")
#: Total densities that every form is asked for, if its floor allows.
DENSITIES = (0.05, 0.1, 0.18, 0.3, 0.5)
#: Calibration windows that densities are measured on.
CALIBRATION_WINDOWS = 2
_TASKS = ("perplexity", "needles")
#: Forms of which a full budget is measured too: the check that it is dense.
_OWN = (PAGES, LEARNED)


class Comparison:
    """A comparison in a folder, which holds all that is finished.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It stays dense.
        tokenizer: Its tokenizer.
        folder: Where to; the folder of an interrupted run is gone on with.
        texts: Documents that nothing was tuned on.
        calibration: Other documents, for knobs, thresholds and rules that learn.
        config: This package's topology; thresholds are set for each density.
        length: Tokens of a perplexity window.
        windows: Perplexity windows; 24, or as many as the texts hold, if None.
        needles: Needle prompts, of all variants in equal parts.
        needle_lengths: Their lengths; one that is named twice is given to twice as many.
        needle_variants: Keys of :data:`~llama_surgery.evaluation.needle_variants.VARIANTS`.
        needle_batch: Prompts of the shortest length that are answered together; of longer ones fewer.
        densities: Total densities wanted of every form.
        adapter: Configuration and learned corrections of an adapter, which becomes the form ``learned``; its
            thresholds are set for each density.
        seed: Of windows, prompts and learning.

    Raises:
        SurgeryError: The model is operated or in training mode, or the folder holds another comparison
            or another adapter's, a model, or an adapter of another library.
        TextError: The texts are too short.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
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
        densities: Sequence[float] = DENSITIES,
        adapter: tuple[SurgeryConfig, Mapping[int, PageRouter]] | None = None,
        seed: int = 0,
    ) -> None:
        check_dense(model, {})
        check_folder(folder)
        if not densities or not all(0 < density < 1 for density in densities):
            raise SurgeryError(f"densities {list(densities)}: give total densities between 0 and 1.")
        self.folder, self.densities = folder, densities
        self._model, self._batch = model, needle_batch
        self._head: Head | None = None
        #: Cells of the last run for which there was not enough memory: the next run tries them again.
        self.no_memory: list[str] = []
        versions = environment(model)
        self._device = {name: versions.pop(name) for name in ("device", "threads")}
        samples = make_samples(
            tokenizer,
            texts,
            calibration,
            folder,
            length=length,
            windows=windows,
            needles=needles,
            needle_lengths=needle_lengths,
            needle_variants=needle_variants,
            seed=seed,
        )
        self._ids, self._prompts = samples.windows, samples.prompts
        settings = {
            "model": model_name(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            **versions,
            "tf32": torch.get_float32_matmul_precision() != "highest",
            "config": {k: v for k, v in config.to_dict().items() if k not in ("theta", "theta_decode")},
            "length": length,
            "windows": len(samples.windows),
            "needles": needles,
            "needle_lengths": list(needle_lengths),
            "needle_variants": list(needle_variants),
            "densities": list(densities),
            "seed": seed,
            "text": digest(*texts),
            "calibration_text": digest(*calibration),
        }
        file = folder / "comparison.json"
        if read_started(file, settings) is None:
            write_json(file, {"settings": settings, "prompts": [_described(p) for p in self._prompts]})
        training, ids = samples.calibration, samples.calibration[:CALIBRATION_WINDOWS]

        def pages(name: str, config: SurgeryConfig, **learned: Any) -> Callable[[], Form]:
            return lambda: PagesForm(name, config, model, tokenizer, texts=calibration, ids=ids, **learned)

        self._forms: dict[str, Callable[[], Form]] = {
            "dense": DenseForm,
            PAGES: pages(PAGES, config),
            "full": lambda: FullForm(model),
        }
        #: By form; refused at once, not after hours of other forms.
        self._adapters: dict[str, str] = {}
        if adapter is not None:
            topology, routers = adapter
            title = f"pages, tile {topology.tile}, learned (this package)"
            self._forms[LEARNED] = pages(LEARNED, topology, routers=routers, title=title)
            self._adapters[LEARNED] = adapter_digest(topology, routers)
            read_budgets(folder, LEARNED, self._adapters[LEARNED])

        def peer(name: str) -> Callable[[], Form]:
            learned = folder / "learned"
            return lambda: PeerForm(name, PEERS[name], model, ids=ids, training=training, folder=learned)

        self._forms |= {name: peer(name) for name in PEERS}

    def run(
        self,
        forms: Sequence[str] | None = None,
        deadline: float | None = None,
        progress: Progress | None = None,
        *,
        first: Sequence[str] = (),
    ) -> bool:
        """Measures what is not there yet: every form at its first density, then at its second, and so on.

        Processes that share a folder leave each other what one of them is measuring.

        Args:
            forms: Names of :data:`FORMS`, all that there are if None.
            deadline: ``time.monotonic()`` after which nothing further is begun.
            progress: Told after each step of a cell.
            first: Those of ``forms`` to finish before the others are begun. Processes do best with different
                ones, for what one density has shown of a form serves the next.

        Returns:
            Whether all cells of these forms are finished.

        Raises:
            SurgeryError: A form does not exist, or needs an adapter that was not given, or a loss is not
                finite.
        """
        there = [name for name in FORMS if name in self._forms]
        forms = there if forms is None else forms
        unknown = [name for name in (*forms, *first) if name not in there]
        if unknown:
            wanting = " 'learned' needs an adapter." if LEARNED in unknown else ""
            raise SurgeryError(f"forms {', '.join(unknown)}: there are {', '.join(there)}.{wanting}")
        made: dict[str, Form] = {}
        self.no_memory = []
        for group in (first, [name for name in forms if name not in first]):
            left, turn = list(group), 0
            while left:
                for name in list(left):
                    if deadline is not None and time.monotonic() > deadline:
                        return False
                    form = made.setdefault(name, self._forms[name]())
                    budgets = Budgets(
                        self.folder, form, self.densities, full=name in _OWN, adapter=self._adapters.get(name)
                    )
                    if turn >= len(budgets.targets):
                        left.remove(name)
                        continue
                    self._measure_density(form, budgets, budgets.targets[turn], deadline, progress)
                turn += 1
        return not unfinished(self.folder, forms)

    def _measure_density(
        self, form: Form, budgets: Budgets, target: float, deadline: float | None, progress: Progress | None
    ) -> None:
        """What is missing of a form at a density, unless another process is at it."""
        missing = [task for task in _TASKS if not _cell(self.folder, form.name, target, task).exists()]
        if not missing:
            return
        with claimed(self.folder, f"{form.name}-{target:.4f}", wait=False) as held:
            if not held:
                return
            for task in missing:
                cell = _cell(self.folder, form.name, target, task)
                if cell.exists():
                    continue  # another process was at it a moment ago
                if deadline is not None and time.monotonic() > deadline:
                    return
                tell = named_progress(progress, f"{form.name} at {target:.3f}")
                try:
                    measured = self._measure(form, budgets.setting(target), task, tell)
                except torch.OutOfMemoryError:
                    self.no_memory.append(f"{form.name} at {target:.3g}, {task}")
                    continue
                write_json(cell, {"form": form.name, "target": target, "task": task, **measured})

    def _measure(
        self, form: Form, setting: dict[str, Any], task: str, progress: Progress | None
    ) -> dict[str, Any]:
        self._head = self._head or Head(self._model, self._ids[0])
        found: dict[str, Any] = {}
        began = time.perf_counter()
        with form.running(setting) as densities:
            if task == "perplexity":
                found["per_window"] = perplexity(self._model, self._ids, progress, head=self._head).per_window
            else:
                found["answers"] = self._answer(progress)
        seconds = time.perf_counter() - began
        return {**found, "density": densities, "setting": setting, "seconds": seconds, **self._device}

    def _answer(self, progress: Progress | None) -> list[bool]:
        """Answers to all prompts, length by length, so that a batch has about the same number of tokens."""
        answers = [False] * len(self._prompts)
        lengths = sorted({prompt.length for prompt in self._prompts})
        for length in lengths:
            chosen = [i for i, prompt in enumerate(self._prompts) if prompt.length == length]
            batch = max(1, self._batch * lengths[0] // length)
            tell = named_progress(progress, f"{length:,} tokens")
            found = score_needles(self._model, [self._prompts[i] for i in chosen], batch, tell)
            for index, right in zip(chosen, found, strict=True):
                answers[index] = right
        return answers


def _described(prompt: NeedlePrompt) -> dict[str, Any]:
    return {name: getattr(prompt, name) for name in ("variant", "kind", "form", "depth", "length", "name")}


def _cell(folder: Path, form: str, target: float, task: str) -> Path:
    return folder / "cells" / f"{form}-{target:.4f}-{task}.json"


def unfinished(folder: Path, forms: Sequence[str]) -> list[str]:
    """Those of ``forms`` of which a density is not measured yet in the folder of a comparison."""
    left = []
    for name in forms:
        targets = targets_of(folder, name)
        cells = (_cell(folder, name, target, task) for target in targets for task in _TASKS)
        if not targets or not all(cell.exists() for cell in cells):
            left.append(name)
    return left


def settings_of(folder: Path) -> Mapping[str, Any]:
    """Settings and prompts of the comparison in ``folder``.

    Raises:
        SurgeryError: There is none.
    """
    try:
        return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"{folder} holds no comparison ({error}): give the folder of 'llama-surgery compare'."
        ) from error

"""One model, one text, one budget of time: does the operated model keep what the dense one can do?"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.evaluate import (
    check_dense,
    evaluate,
    model_name,
    named_progress,
    versions,
)
from llama_surgery.evaluation.io import Progress, read_started
from llama_surgery.evaluation.ruler.result import RulerResult
from llama_surgery.evaluation.ruler.run import run_ruler, text_digest
from llama_surgery.evaluation.ruler.samples import Sampler
from llama_surgery.evaluation.verdict import (
    FEW_POINTS,
    Limits,
    ruler_findings,
    telling_tasks,
    text_finding,
    unmeasured,
    verdict,
)
from llama_surgery.files import write_json
from llama_surgery.folders import check_folder
from llama_surgery.surgery.context import context_length
from llama_surgery.text import encode, leading_tokens
from llama_surgery.topology.router import PageRouter

#: Tasks that need no file, ask for short answers and stress different things: exact retrieval, telling like
#: facts apart, finding all of several, following a chain, adding up over the whole context.
TASKS = ("niah_single_3", "niah_multikey_2", "niah_multivalue", "vt", "fwe")
LENGTHS = (8192, 16384, 32768, 65536)
OPERATED = "operated"
#: Samples of a cell before the next one has its turn: few, so that no task is left out when time is over.
TURN = 4
#: Time is shared out as if a prompt cost its tokens, and its answer, which is made step by step, these.
ANSWER_COST = 8192
#: Share of a text that thresholds are set on.
CALIBRATION_SHARE = 0.25


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Text to set thresholds on, and text to measure on, which have nothing in common.

    Every document is cut at the paragraph after its first quarter.

    Raises:
        TextError: No document has a paragraph there.
    """
    first, rest = [], []
    for text in texts:
        cut = text.find("\n\n", int(CALIBRATION_SHARE * len(text)))
        if cut >= 0:
            first.append(text[:cut])
            rest.append(text[cut:].strip())
    if not any(first) or not any(rest):
        raise TextError(
            "the text cannot be split: no empty line stands after the first quarter of a document. Give two "
            "texts, one of them for calibration."
        )
    return [text for text in first if text], [text for text in rest if text]


def verify(
    model: nn.Module,
    sampler: Sampler,
    *,
    texts: Sequence[str],
    config: SurgeryConfig,
    routers: Mapping[int, PageRouter] | None = None,
    folder: str | Path,
    deadline: float,
    lengths: Sequence[int] = LENGTHS,
    tasks: Sequence[str] = TASKS,
    samples: int = 100,
    windows: int = 12,
    batch_size: int = 1,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures perplexity and RULER tasks length by length, and holds the bounds against limits.

    What time is left is shared out over the lengths left, so that each gets about as many samples, and
    within one over its tasks. The same call goes on where an earlier one stopped: windows are not measured
    twice, and RULER gets further samples.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It comes back dense.
        sampler: Makes RULER samples; its tokenizer is the model's, its seed that of the windows.
        texts: Documents to measure perplexity on. Not those that thresholds were set on.
        config: The topology, thresholds set.
        routers: Learned corrections by layer index, or None.
        folder: Where results are kept, ``verify.json`` and a file of RULER answers for each length.
        deadline: ``time.monotonic()`` after which nothing further is begun.
        lengths: Tokens of windows, and of prompt and answer together.
        tasks: RULER tasks.
        samples: Most samples of each task at each length.
        windows: Most perplexity windows at each length.
        batch_size: Samples that are answered together.
        limits: What may be lost; the defaults of :class:`~llama_surgery.evaluation.verdict.Limits` if None.
        progress: Told as ``progress(stage, done, total)``.

    Returns:
        Plain values, ready for JSON, as in ``verify.json``: ``settings``, ``verdict``, ``findings``,
        ``skipped`` (what was not measured or does not count, with the reason), ``text`` (results by length)
        and ``ruler`` (rows).

    Raises:
        SurgeryError: The model is operated or in training mode, or the folder holds a run with other
            settings, a model, or an adapter of another library.
        TextError: A task does not exist or its samples cannot be made.
    """
    limits, folder, lengths = limits or Limits(), check_folder(Path(folder)), sorted(set(lengths))
    if not lengths or not tasks:
        raise SurgeryError(f"lengths {lengths}, tasks {list(tasks)}: at least one of each is needed.")
    check_dense(model, {OPERATED: config})
    settings = {
        "model": model_name(model),
        "config": config.to_dict(),
        "text": text_digest(*texts),
        "windows": windows,
        "seed": sampler.seed,
        "versions": versions(model),
    }
    context, file = context_length(model), folder / "verify.json"
    run = _Run(
        model,
        sampler,
        {"configs": {OPERATED: config}, "routers": routers},
        folder,
        read_started(file, settings),
    )
    within = [length for length in lengths if context is None or length <= context]
    run.skipped += [
        f"{length:,} tokens: {settings['model']} was made for {context:,}"
        for length in lengths
        if length not in within
    ]
    for number, length in enumerate(within):
        tell = named_progress(progress, f"{length:,} tokens")
        now = time.monotonic()
        if now >= deadline:
            run.skipped += [f"{other:,} tokens: time was over" for other in within[number:]]
            break
        left = sum(other + ANSWER_COST for other in within[number:])
        until = now + (deadline - now) * (length + ANSWER_COST) / left
        try:
            run.read(texts, length, windows, tell)
            run.ask(tasks, length, samples, batch_size, until, tell)
        except torch.OutOfMemoryError:
            run.skipped.append(f"the rest at {length:,} tokens, and all beyond: out of memory")
            torch.cuda.empty_cache()
            break
        finally:
            write_json(file, run.report(settings, limits))
    report = run.report(settings, limits)
    write_json(file, report)
    return report


class _Run:
    """What has been measured so far.

    Args:
        model, sampler: As of :func:`verify`.
        operation: ``configs`` and ``routers``, as evaluations take them.
        folder: Of the files of RULER answers.
        before: The report of an earlier run, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler,
        operation: dict[str, Any],
        folder: Path,
        before: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._sampler, self._operation, self._folder = model, sampler, operation, folder
        self._text: dict[str, Any] = dict(before["text"]) if before else {}
        self._parts: list[RulerResult] = []
        self.skipped: list[str] = []

    def read(self, texts: Sequence[str], length: int, windows: int, progress: Progress | None) -> None:
        """Perplexity of both models at a length, if it was not measured before."""
        if str(length) in self._text:
            return
        tokenizer = self._sampler.tokenizer
        body, count = length - len(leading_tokens(tokenizer)), 0
        for text in texts:  # until there are enough, since tokenising is slow
            if count < windows:
                count = min(windows, count + len(encode(tokenizer, text)) // body)
        if not count:
            self.skipped.append(f"perplexity at {length:,} tokens: the text holds no window of that length")
            return
        result = evaluate(
            self._model,
            tokenizer,
            eval_texts=texts,
            length=length,
            windows=count,
            needles=0,
            seed=self._sampler.seed,
            progress=progress,
            **self._operation,
        )
        self._text[str(length)] = result.to_dict()

    def ask(
        self,
        tasks: Sequence[str],
        length: int,
        samples: int,
        batch_size: int,
        deadline: float,
        progress: Progress | None,
    ) -> None:
        """RULER at a length, on from what was answered before."""
        part = run_ruler(
            self._model,
            self._sampler,
            tasks=tasks,
            lengths=[length],
            samples=samples,
            batch_size=batch_size,
            file=self._folder / f"ruler-{length}.json",
            turn=TURN,
            deadline=deadline,
            progress=progress,
            **self._operation,
        )
        self._parts.append(part)
        if not part.complete:
            done = sorted(len(part.scores(OPERATED, task=task)) for task in tasks)
            self.skipped.append(
                f"RULER at {length:,} tokens: {done[0]} to {done[-1]} of {samples} samples a task, then time "
                "was over"
            )

    def report(self, settings: dict[str, Any], limits: Limits) -> dict[str, Any]:
        """What :func:`verify` returns."""
        by_length = sorted((int(length), text) for length, text in self._text.items())
        findings = [text_finding(length, text["operated"][0]["ratio"], limits) for length, text in by_length]
        remarks, ruler = list(self.skipped), _merged(self._parts)
        if ruler is not None:
            findings += ruler_findings(ruler, OPERATED, limits)
            silent = [task for task in ruler.settings["tasks"] if task not in telling_tasks(ruler)]
            if silent:
                remarks.append(
                    f"{', '.join(silent)}: dense scores under {100 * FEW_POINTS:.0f}, where no loss can show"
                )
        remarks += [f"{measure}: nothing was measured that counts" for measure in unmeasured(findings)]
        return {
            "settings": settings,
            "limits": dataclasses.asdict(limits),
            "verdict": verdict(findings),
            "findings": [finding.to_dict() for finding in findings],
            "skipped": remarks,
            "text": self._text,
            "ruler": [] if ruler is None else ruler.rows(),
        }


def _merged(parts: Sequence[RulerResult]) -> RulerResult | None:
    """All lengths as one result."""
    if not parts:
        return None
    lengths = [length for part in parts for length in part.settings["lengths"]]
    return RulerResult(
        {**parts[0].settings, "lengths": lengths}, [cell for part in parts for cell in part.cells]
    )

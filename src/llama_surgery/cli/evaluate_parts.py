"""What ``llama-surgery evaluate`` measures, part by part."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_surgery.cli.console import err
from llama_surgery.config import SurgeryConfig

if TYPE_CHECKING:
    from llama_surgery.evaluation.verdict import Limits
    from llama_surgery.surgery.progress import Progress


@dataclasses.dataclass
class Parts:
    """What was asked for, and what was found.

    Attributes:
        configs: Topologies by name.
        texts, calibration: Documents to measure on, and to set thresholds on.
        length, windows, seed: Of perplexity windows.
        needles, needle_lengths, needle_variants: Planted facts.
        batch: Prompts answered together.
        deadline: ``time.monotonic()`` after which nothing optional is begun.
        routers: Corrections of layers by index, by the topology's name; without, operate() finds some.
        results: Plain values, for ``results.json``.
        rows: Of the CSV files, by name.
    """

    configs: dict[str, SurgeryConfig]
    texts: list[str]
    calibration: list[str]
    length: int
    windows: int | None
    needles: int | None
    needle_lengths: list[int] | None
    needle_variants: list[str]
    batch: int
    seed: int
    deadline: float | None
    routers: dict[str, Any] = dataclasses.field(default_factory=dict)
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    model: Any = None
    tokenizer: Any = None
    kept: Any = None
    ruler: Any = None
    tell: "Progress" = lambda stage, done, total: None

    def read_ruler(self, tasks: list[str], questions: dict[str, Path | None], haystack: Path | None) -> None:
        """Read what RULER's samples are made of, before a model is loaded."""
        from llama_surgery.evaluation.ruler.materials import Materials
        from llama_surgery.evaluation.ruler.questions import read_questions
        from llama_surgery.evaluation.ruler.tasks import READING, TASKS, task_of
        from llama_surgery.text import read_texts

        given = {name: read_questions(path) for name, path in questions.items() if path is not None}
        for name in tasks:
            task_of(name)
        left = [name for name in READING if name not in given]
        if not tasks and left:
            err.print(f"Left out: {', '.join(left)} (no question file, see --help).", highlight=False)
        self._tasks = tasks or [name for name in TASKS if name not in left]
        self._materials = Materials.of(None if haystack is None else read_texts(haystack), given)

    def load(self, model: Any, tokenizer: Any, folder: Path | None) -> None:
        """Take the model, and the folder in which what is finished is kept."""
        from llama_surgery.evaluation.evaluate import model_name, versions
        from llama_surgery.evaluation.kept import Kept

        self.model, self.tokenizer = model, tokenizer
        self.kept = Kept(folder, model=model_name(model), **versions(model))

    def calibrate(self, density: float, decode_density: float | None) -> None:
        """Set the thresholds of all topologies, and budgets by head where none were learned."""
        from llama_surgery.evaluation.kept import adapter_digest, digest, with_parts

        text = digest(*self.calibration)
        for name, config in self.configs.items():
            routers, asked = self.routers.get(name), {"density": density, "length": self.length}
            asked["decode_density"] = decode_density if config.tile > 1 else None
            find = functools.partial(self._thresholds, config, routers, asked)
            decides = {"topology": adapter_digest(config, routers), **asked}
            kept = self.kept.once("thresholds", find, **decides, text=text)
            self.configs[name] = SurgeryConfig.from_dict(kept["config"])
            self.routers[name] = with_parts(routers, kept["routers"])
        told = self.conditions.pop("calibration text", "the first quarter of each document")
        self.conditions["thresholds"] = f"set on {told} for a far density of {density:.2%}"

    def _thresholds(self, config: SurgeryConfig, routers: Any, asked: dict[str, Any]) -> dict[str, Any]:
        from llama_surgery.evaluation.evaluate import named_progress
        from llama_surgery.evaluation.kept import found_parts
        from llama_surgery.surgery.operate import operated
        from llama_surgery.surgery.operation import config_of, routers_of

        tell = named_progress(self.tell, f"T = {config.tile}")
        given = {"text": self.calibration, "tokenizer": self.tokenizer, "progress": tell, **asked}
        with operated(self.model, config, routers=routers, **given):
            return {
                "config": config_of(self.model).to_dict(), "routers": found_parts(routers_of(self.model))
            }  # fmt: skip

    def measure_texts(self) -> None:
        """Perplexity, divergence, needles and times."""
        from llama_surgery.evaluation.evaluate import evaluate
        from llama_surgery.report.extract import besides
        from llama_surgery.report.results import make_results

        needles = {"needles": self.needles or 0, "needle_lengths": self.needle_lengths}
        needles |= {"needle_variants": self.needle_variants, "needle_batch": self.batch}
        shared = {"length": self.length, "windows": self.windows, "seed": self.seed}

        def found() -> dict[str, Any]:
            asked = (self.model, self.tokenizer)
            result = evaluate(*asked, eval_texts=self.texts, **self._forms, **shared, **needles)
            more = besides(*asked, result, self.configs, self.routers, self.texts, self.tell)
            return {
                "results": make_results(result, conditions=self.conditions, **more),
                "rows": result.rows(),
            }

        decides = {**self._decides(self.texts), **shared}
        kept = self.kept.once("texts", found, **decides, **needles, conditions=self.conditions)
        self.results, self.rows["results"] = kept["results"] | self.results, kept["rows"]

    def write_on(self, count: int, tokens: int) -> None:
        """Long texts of the models' own."""
        from llama_surgery.evaluation.long_generation import long_generation

        shared = {"length": self.length, "new_tokens": tokens, "count": count, "seed": self.seed}

        def found() -> dict[str, Any]:
            return long_generation(self.model, self.tokenizer, texts=self.texts, **self._forms, **shared)

        self.results["continuations"] = self.kept.once(
            "continuations", found, **self._decides(self.texts), **shared
        )

    def prepare_ruler(self, lengths: Sequence[int], samples: int, chat: bool | None) -> None:
        """Refuse what RULER cannot be asked, before anything is measured."""
        from llama_surgery.evaluation.ruler.run import check_samples
        from llama_surgery.evaluation.ruler.samples import Sampler

        chat = bool(getattr(self.tokenizer, "chat_template", None)) if chat is None else chat
        self._sampler = Sampler(self.tokenizer, self._materials, seed=self.seed, chat=chat)
        self._asked: dict[str, Any] = {"tasks": self._tasks, "lengths": lengths, "samples": samples}
        check_samples(self.model, self._sampler, **self._asked)

    def answer_ruler(self) -> None:
        """RULER's tasks."""
        from llama_surgery.evaluation.ruler.run import run_ruler

        self.ruler = run_ruler(
            self.model,
            self._sampler,
            batch_size=self.batch,
            kept=self.kept,
            deadline=self.deadline,
            **self._forms,
            **self._asked,
        )
        self.results["ruler"], self.rows["ruler"] = self.ruler.to_dict(), self.ruler.rows()

    def answer_tasks(
        self, given: Sequence[str], include: Path | None, limit: int | None, shots: int | None
    ) -> None:
        """Tasks of lm-evaluation-harness."""
        import logging

        from llama_surgery.evaluation.kept import adapter_digest
        from llama_surgery.evaluation.lm_eval import compare_on_tasks

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tasks = [task.strip() for task in given if task.strip()]
        shared = {"limit": limit, "few_shot": shots, "batch_size": self.batch, "seed": self.seed}
        found = self.results["lm_eval"] = {}
        for name, config in self.configs.items():
            routers = self.routers.get(name)
            answer = functools.partial(
                compare_on_tasks, self.model, self.tokenizer, tasks,
                config=config, routers=routers, include=include, **shared,
            )  # fmt: skip
            topology = adapter_digest(config, routers)
            found[name] = self.kept.once("lm-eval", answer, tasks=tasks, topology=topology, **shared)

    def compare(self, adapter: Any, rules: Sequence[str] | None, densities: Sequence[float] | None) -> None:
        """Other selection rules, beside the first topology and an adapter's."""
        from llama_surgery.evaluation.compare import DENSITIES, Comparison

        quarter = self.length // 4
        comparison = Comparison(
            self.model,
            self.tokenizer,
            self.kept,
            texts=self.texts,
            calibration=self.calibration,
            config=next(iter(self.configs.values())),
            length=self.length,
            windows=self.windows,
            needles=200 if self.needles is None else self.needles,
            # Shorter ones twice as often.
            needle_lengths=self.needle_lengths or [quarter, quarter, 2 * quarter, 2 * quarter, self.length],
            needle_variants=self.needle_variants,
            needle_batch=self.batch,
            rules=rules,
            densities=densities or DENSITIES,
            adapter=adapter,
            seed=self.seed,
        )
        self.results["against"] = comparison.run(self.deadline, self.tell)
        self.rows["comparison"] = self.results["against"]["rows"]

    def judge(self, limits: "Limits") -> None:
        """Hold what was found against limits."""
        from llama_surgery.evaluation.verdict import find, verdict

        findings = find(self.results, self.ruler, limits)
        self.results["gate"] = {
            "limits": dataclasses.asdict(limits),
            "verdict": verdict(findings),
            "findings": [finding.to_dict() for finding in findings],
        }

    @property
    def _forms(self) -> dict[str, Any]:
        """What is measured, whatever is measured of it."""
        return {"configs": self.configs, "routers": self.routers, "progress": self.tell}

    def _decides(self, texts: Sequence[str]) -> dict[str, Any]:
        from llama_surgery.evaluation.kept import adapter_digest, digest

        topologies = {n: adapter_digest(c, self.routers.get(n)) for n, c in self.configs.items()}
        return {"text": digest(*texts), "topologies": topologies}

"""What ``llama-surgery evaluate`` measures, part by part."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_surgery.cli import tables
from llama_surgery.cli.console import err, out, print_json, say
from llama_surgery.config import SurgeryConfig
from llama_surgery.evaluation.compare import DENSITIES, Comparison
from llama_surgery.evaluation.evaluate import evaluate, model_name, named_progress, versions
from llama_surgery.evaluation.kept import Kept, adapter_digest, digest, found_parts, with_parts
from llama_surgery.evaluation.lm_eval import compare_on_tasks, task_manager, task_sources
from llama_surgery.evaluation.long_generation import long_generation
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.result import RulerResult
from llama_surgery.evaluation.ruler.run import check_samples, run_ruler
from llama_surgery.evaluation.ruler.tasks import Sampler
from llama_surgery.evaluation.verdict import Limits, find, verdict
from llama_surgery.files import write_atomically, write_csv, write_json
from llama_surgery.report.extract import besides
from llama_surgery.report.frontier import comparison
from llama_surgery.report.results import header, make_results
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import config_of, routers_of
from llama_surgery.surgery.progress import Progress

#: What a verdict means.
VERDICTS = {
    "kept": "Kept: every loss is within its limit, bounds included, at what was measured.",
    "exceeded": "Exceeded: some loss is beyond its limit, even at the favourable end of its interval.",
    "open": "Open: some interval reaches across its limit, or something was not measured.",
}


@dataclasses.dataclass(kw_only=True)
class Parts:
    """What was asked for, and what was found.

    Attributes:
        folder: Where results are written, and what is finished is kept; nowhere if None.
        configs: Topologies by name.
        routers: Corrections of layers by index, by the topology's name; without, operate() finds some.
        texts, calibration: Documents to measure on, and to set thresholds on.
        length, windows, seed: Of perplexity windows.
        needles, needle_lengths, needle_variants: Planted facts.
        batch: Prompts answered together.
        deadline: ``time.monotonic()`` after which nothing optional is begun.
        conditions: What a report is to say of it besides.
        results: Plain values, for ``results.json``.
        rows: Of the CSV files, by name.
    """

    model: Any
    tokenizer: Any
    folder: Path | None
    configs: dict[str, SurgeryConfig]
    routers: dict[str, Any]
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
    conditions: dict[str, str]
    tell: Progress = lambda stage, done, total: None
    ruler: RulerResult | None = None
    results: dict[str, Any] = dataclasses.field(default_factory=header)
    rows: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = Kept(self.folder, model=model_name(self.model), **versions(self.model))

    def calibrate(self, density: float, decode_density: float | None) -> None:
        """Set the thresholds of all topologies, and budgets by head where none were learned."""
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
        tell = named_progress(self.tell, f"T = {config.tile}")
        given = {"text": self.calibration, "tokenizer": self.tokenizer, "progress": tell, **asked}
        with operated(self.model, config, routers=routers, **given):
            found = found_parts(routers_of(self.model))
            return {"config": config_of(self.model).to_dict(), "routers": found}

    def measure_texts(self) -> None:
        """Perplexity, divergence, needles and times."""
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
        self.results, self.rows["results"] = self.results | kept["results"], kept["rows"]
        self.write()

    def write_on(self, count: int, tokens: int) -> None:
        """Long texts of the models' own."""
        shared = {"length": self.length, "new_tokens": tokens, "count": count, "seed": self.seed}

        def found() -> dict[str, Any]:
            return long_generation(self.model, self.tokenizer, texts=self.texts, **self._forms, **shared)

        self.results["continuations"] = self.kept.once(
            "continuations", found, **self._decides(self.texts), **shared
        )
        self.write()

    def prepare_ruler(self, materials: Materials, chat: bool | None, **asked: Any) -> None:
        """Refuse what RULER cannot be asked, before anything is measured."""
        chat = bool(getattr(self.tokenizer, "chat_template", None)) if chat is None else chat
        self._sampler = Sampler(self.tokenizer, materials, seed=self.seed, chat=chat)
        self._asked = asked
        check_samples(self.model, self._sampler, **asked)

    def answer_ruler(self) -> None:
        """RULER's tasks."""
        given = {"batch_size": self.batch, "kept": self.kept, "deadline": self.deadline}
        self.ruler = run_ruler(self.model, self._sampler, **given, **self._forms, **self._asked)
        self.results["ruler"], self.rows["ruler"] = self.ruler.to_dict(), self.ruler.rows()
        self.write()

    def prepare_tasks(self, tasks: list[str], include: Path | None) -> None:
        """Refuse tasks that lm-evaluation-harness does not have, before anything is measured."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        task_manager(tasks, include)
        self._tasks = {"tasks": tasks, **task_sources(tasks, include)}

    def answer_tasks(self, include: Path | None, limit: int | None, shots: int | None) -> None:
        """Tasks of lm-evaluation-harness."""
        tasks = self._tasks["tasks"]
        shared = {"limit": limit, "few_shot": shots, "batch_size": self.batch, "seed": self.seed}
        found = self.results["lm_eval"] = {}
        for name, config in self.configs.items():
            routers = self.routers.get(name)
            given = {"config": config, "routers": routers, "include": include, **shared}
            answer = functools.partial(compare_on_tasks, self.model, self.tokenizer, tasks, **given)
            topology = adapter_digest(config, routers)
            found[name] = self.kept.once("lm-eval", answer, **self._tasks, topology=topology, **shared)
            self.write()

    def compare(self, adapter: Any, rules: Sequence[str] | None, densities: Sequence[float] | None) -> None:
        """Other selection rules, beside the first topology and an adapter's."""
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
        self.write()

    def judge(self, limits: Limits) -> None:
        """Hold what was found against limits."""
        findings = find(self.results, self.ruler, limits)
        self.results["gate"] = {
            "limits": dataclasses.asdict(limits),
            "verdict": verdict(findings),
            "findings": [finding.to_dict() for finding in findings],
        }
        self.write()

    def write(self) -> None:
        """Write all that was found so far, tables and the figure of a comparison."""
        if self.folder is None:
            return
        write_json(self.folder / "results.json", self.results)
        for name, rows in self.rows.items():
            write_csv(self.folder / f"{name}.csv", rows)
        if "against" in self.results:
            svg = comparison(self.results["against"]["rows"])
            write_atomically(
                self.folder / "comparison.svg", lambda path: path.write_text(svg, encoding="utf-8")
            )

    @property
    def _forms(self) -> dict[str, Any]:
        """What is measured, whatever is measured of it."""
        return {"configs": self.configs, "routers": self.routers, "progress": self.tell}

    def _decides(self, texts: Sequence[str]) -> dict[str, Any]:
        topologies = {n: adapter_digest(c, self.routers.get(n)) for n, c in self.configs.items()}
        return {"text": digest(*texts), "topologies": topologies}


def show(parts: Parts, json: bool) -> None:
    """Print what was found."""
    results, folder = parts.results, parts.folder
    if json:
        print_json(results)
        return
    shown: list[Any] = []
    if "dense" in results:
        shown.append(tables.summary_table(results))
        harder = results["needles"] and len(parts.needle_variants) > 1
        shown += [tables.needle_table(results)] if harder else []
        shown += [tables.continuation_table(results)] if "continuations" in results else []
    if parts.ruler is not None:
        lengths = parts.ruler.settings["lengths"]
        every = [*lengths, None] if len(lengths) > 1 else lengths
        shown += [tables.ruler_table(parts.ruler, length) for length in every]
    shown += [tables.tasks_table(name, found) for name, found in results.get("lm_eval", {}).items()]
    if "against" in results:
        shown.append(tables.comparison_table(results["against"]))
    if "gate" in results:
        shown.append(tables.gate_table(results["gate"]))
    for table in shown:
        out.print(table)
    if "gate" in results:
        say(f"[bold]{VERDICTS[results['gate']['verdict']]}[/]")
    until = max(config.dense_until for config in parts.configs.values())
    if until:
        all_dense = "dense" in results and until >= parts.length
        told = f": all of these {parts.length:,} tokens are read densely"
        say(f"Dense below position {until:,} by its configuration{told if all_dense else ''}.")
    unfinished = parts.ruler is not None and not parts.ruler.complete
    if unfinished or results.get("against", {}).get("unfinished"):
        err.print("Not everything is finished: run the command again to go on.", highlight=False)
    if folder is not None:
        say(f"Written: {folder.resolve()}")

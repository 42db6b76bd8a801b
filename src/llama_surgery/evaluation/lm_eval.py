"""Tasks of EleutherAI's lm-evaluation-harness, answered by the dense and by the operated model.

Both run through the harness's own ``HFLM``, so that figures compare with those published for the dense
model. Needs ``pip install 'llama-surgery[lm-eval]'``.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import check_dense, environment, model_name
from llama_surgery.evaluation.intervals import paired_change
from llama_surgery.evaluation.kept import digest
from llama_surgery.evaluation.result import DENSE
from llama_surgery.surgery import operation
from llama_surgery.surgery.operate import operated
from llama_surgery.topology.router import PageRouter


def compare_on_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    config: SurgeryConfig,
    routers: Mapping[int, PageRouter] | None = None,
    include: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs tasks on the dense model, then operated, over the same samples.

    Log-likelihoods are those of a prefill, in tiles; generated answers are decoded.
    Arguments that are not named here are those of :func:`~llama_surgery.evaluation.evaluate.evaluate`.

    Args:
        tasks: Names of tasks, groups or tags, or paths of tasks' own YAML files.
        config: The topology, thresholds set.
        include: Folder with YAML files of further tasks.
        limit: Samples of each task, the first ones; all if None.
        few_shot: Examples before each question; the task's own number if None.
        batch_size: Requests that are computed together.
        seed: Of the choice of examples and of whatever else a task draws.

    Returns:
        Plain values, ready for JSON: ``model``, ``config``, ``environment``, ``settings``,
        ``task_versions``, ``density`` (of all that the operated model computed) and ``rows``, one for each
        task, metric and filter: ``samples``, ``dense``, ``dense_stderr``, ``operated``, ``operated_stderr``,
        ``difference`` and, where the metric is the mean of samples' scores in 0…1, its paired 95% interval
        ``low`` … ``high`` and how many samples were ``lost`` and ``won``; else these are None.

    Raises:
        SurgeryError: The harness is not installed, a task is unknown or its data cannot be loaded, or the
            model is operated or in training mode.
    """
    manager = task_manager(tasks, include)
    check_dense(model, {})
    settings: dict[str, Any] = {"tasks": list(tasks), "num_fewshot": few_shot, "limit": limit, "seed": seed}
    dense = _run(model, tokenizer, manager, settings, batch_size)
    with operated(model, config, routers=routers):
        own = _run(model, tokenizer, manager, settings, batch_size)
        density = operation.statistics(model).to_dict()
    return {
        "model": model_name(model),
        "config": config.to_dict(),
        "environment": {**environment(model), "lm_eval": version("lm-eval")},
        "settings": {**settings, "batch_size": batch_size},
        "task_versions": dense["versions"],
        "density": density,
        "rows": [
            _row(task, key, dense, own)
            for task, measured in dense["results"].items()
            for key in measured
            if "," in key and not key.partition(",")[0].endswith("_stderr")
        ],
    }


def task_manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    """The harness's index of tasks, without its own where none of them is wanted (they take seconds).

    Raises:
        SurgeryError: The harness is not installed, or a task is unknown.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SurgeryError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'llama-surgery[lm-eval]'."
        ) from error

    unknown = ["none was given"]
    for defaults in (False, True) if tasks else ():
        manager = TaskManager(
            include_path=None if include is None else str(include), include_defaults=defaults
        )
        unknown = [
            task
            for task in tasks
            if not manager.match_tasks([task]) and not (Path(task).suffix == ".yaml" and Path(task).is_file())
        ]
        if not unknown:
            return manager
    raise SurgeryError(
        f"no such tasks: {', '.join(unknown)}. Give names that 'lm-eval ls tasks' lists, or the folder of "
        "your own by include."
    )


def task_sources(tasks: Sequence[str], include: Path | None) -> dict[str, str]:
    """The harness's version, and a fingerprint of the tasks' own files: what answers depend on besides."""
    own = [Path(task) for task in tasks if Path(task).suffix == ".yaml" and Path(task).is_file()]
    further = [] if include is None else sorted(include.rglob("*"))
    own += [path for path in further if path.suffix in (".yaml", ".yml", ".py") and path.is_file()]
    files = [f"{path.name} {path.read_text(encoding='utf-8', errors='replace')}" for path in own]
    return {"lm_eval": version("lm-eval"), "files": digest(*files)}


def _run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    settings: Mapping[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=settings["tasks"],
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            task_manager=manager,
            **dict.fromkeys(seeds, settings["seed"]),
        )
    except OSError as error:  # what data sets raise that are absent, or that there is no network for
        raise SurgeryError(
            f"the data of {', '.join(settings['tasks'])} could not be loaded: {error}"
        ) from error


def _row(task: str, key: str, dense: Mapping[str, Any], operated: Mapping[str, Any]) -> dict[str, Any]:
    metric, _, filtered = key.partition(",")
    row: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "filter": filtered,
        "samples": dense.get("n-samples", {}).get(task, {}).get("effective"),
    }
    for name, found in ((DENSE, dense), ("operated", operated)):
        row[name] = float(found["results"][task][key])
        error = found["results"][task].get(f"{metric}_stderr,{filtered}")
        row[f"{name}_stderr"] = float(error) if isinstance(error, (int, float)) else None
    row |= {"difference": row["operated"] - row[DENSE], "low": None, "high": None, "lost": None, "won": None}
    scores = [_scores(found["samples"].get(task, []), metric, filtered) for found in (dense, operated)]
    if all(_is_mean(values, row[name]) for values, name in zip(scores, (DENSE, "operated"), strict=True)):
        change = paired_change([([*map(float, scores[0])], [*map(float, scores[1])])])
        row |= {name: getattr(change, name) for name in ("low", "high", "lost", "won")}
    return row


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> list[Any]:
    """A metric's values of single samples, in order; groups have none."""
    own = [sample for sample in samples if sample["filter"] == filtered and metric in sample]
    return [sample[metric] for sample in sorted(own, key=lambda sample: sample["doc_id"])]


def _is_mean(values: Sequence[Any], total: float) -> bool:
    """Whether a metric is the mean of these scores, each in 0…1."""
    within = all(isinstance(value, Real) and 0 <= value <= 1 for value in values)
    return bool(values) and within and abs(sum(values) / len(values) - total) < 1e-6

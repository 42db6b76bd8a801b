"""``llama-surgery ruler``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli.common import (
    AdapterOption,
    BatchOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    err,
    load_model,
    out,
    print_json,
    progress,
    split_values,
    token_counts,
    topology_of,
)

_TASKS, _SAMPLES = "Tasks", "Samples"


def ruler(
    model: ModelArgument,
    adapter: AdapterOption = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens of prompt and answer: 4096 or 4k, several after commas. May be repeated. 4k and 8k "
            "if left out.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Samples of each task at each length.", rich_help_panel=_SAMPLES)
    ] = 100,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks, several after commas. May be repeated. All if left out; those that read documents "
            "only where their question file is given.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    qa_1: Annotated[
        Path | None,
        typer.Option(
            "--qa-1", help="Question file for qa_1, as SQuAD's or HotpotQA's.", rich_help_panel=_TASKS
        ),
    ] = None,
    qa_2: Annotated[
        Path | None,
        typer.Option(
            "--qa-2", help="Question file for qa_2, as SQuAD's or HotpotQA's.", rich_help_panel=_TASKS
        ),
    ] = None,
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="Prose that facts are hidden in: a .txt file or a folder of them. A book in the public "
            "domain if left out.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Use the tokenizer's chat template, as instruction-tuned models expect.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    batch: BatchOption = 1,
    seed: SeedOption = 0,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Results as JSON. A run that was interrupted goes on from this file."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write one row for each model, task and length as CSV.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Answer RULER's thirteen long-context tasks with the dense model and operated, sample by sample.

    Needles in noise, prose and other needles, variable tracking, counting and questions over documents, by
    generators of its own: scores compare models here, not with published tables. Without an adapter the
    documented default topology is measured, whose thresholds are not calibrated for your model. Example:

    llama-surgery ruler MODEL --adapter adapter --length 4k,8k --qa-1 dev-v2.0.json --out ruler.json
    """
    lengths = token_counts(length or ["4k", "8k"])
    from llama_surgery.evaluation.ruler.materials import Materials
    from llama_surgery.evaluation.ruler.questions import read_questions
    from llama_surgery.evaluation.ruler.tasks import READING, TASKS, task_of
    from llama_surgery.text import read_texts

    given = {name: path for name, path in zip(READING, (qa_1, qa_2), strict=True) if path is not None}
    tasks = split_values(task or []) or [name for name in TASKS if name not in READING or name in given]
    for name in tasks:
        task_of(name)
    if not task and len(given) < len(READING):
        left = [name for name in READING if name not in given]
        err.print(f"Left out: {', '.join(left)} (no question file, see --help).", highlight=False)
    materials = Materials.of(
        None if haystack is None else read_texts(haystack),
        {name: read_questions(path) for name, path in given.items()},
    )
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter)
    from llama_surgery.evaluation.ruler.run import run_ruler
    from llama_surgery.evaluation.ruler.samples import Sampler

    config, routers = topology_of(llm, adapter)
    with progress() as tell:
        result = run_ruler(
            llm,
            Sampler(tokenizer, materials, seed=seed, chat=chat),
            configs={f"T = {config.tile}": config},
            tasks=tasks,
            lengths=lengths,
            samples=samples,
            routers=routers,
            batch_size=batch,
            file=out_file,
            progress=tell,
        )
    if csv is not None:
        result.write_csv(csv)
    if json:
        print_json(result.to_dict())
        return
    _print_tables(result, lengths)
    for path in (out_file, csv):
        if path is not None:
            out.print(f"Written: {path.resolve()}", soft_wrap=True, highlight=False)


def _print_tables(result: object, lengths: Sequence[int]) -> None:
    from llama_surgery.cli.ruler_tables import ruler_table

    for tokens in sorted(set(lengths)):
        out.print(ruler_table(result, tokens))
    if len(set(lengths)) > 1:
        out.print(ruler_table(result, None))

"""``llama-surgery lm-eval``."""

from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli.common import (
    AdapterArgument,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    load_model,
    out,
    print_json,
    topology_of,
)


def lm_eval(
    model: ModelArgument,
    tasks: Annotated[
        str, typer.Option(help="Tasks, groups or tags of the harness, separated by commas, or YAML files.")
    ],
    adapter: AdapterArgument = None,
    include: Annotated[Path | None, typer.Option(help="Folder with YAML files of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task. All if left out.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. The task's own if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are computed together.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same examples.")] = 0,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the results as JSON.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Answer tasks of lm-evaluation-harness with the dense model and operated, sample by sample.

    Needs pip install 'llama-surgery[lm-eval]'. Most of its tasks download their data, and most are short: an
    operated model differs from the dense one only where the context is longer than its near field. Example:

    llama-surgery lm-eval MODEL adapter --tasks lambada_openai,hellaswag --limit 200
    """
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter)
    import logging

    from llama_surgery.evaluation.lm_eval import compare_on_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config, routers = topology_of(llm, adapter)
    results = compare_on_tasks(
        llm,
        tokenizer,
        [task.strip() for task in tasks.split(",") if task.strip()],
        config=config,
        routers=routers,
        include=include,
        limit=limit,
        few_shot=few_shot,
        batch_size=batch,
        seed=seed,
    )
    if out_file is not None:
        from llama_surgery.files import write_json

        write_json(out_file, results)
    if json:
        print_json(results)
        return
    from llama_surgery.cli.tables import tasks_table

    out.print(tasks_table(results))
    if out_file is not None:
        out.print(f"Written: {out_file.resolve()}", soft_wrap=True, highlight=False)

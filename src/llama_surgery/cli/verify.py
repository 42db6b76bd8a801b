"""``llama-surgery verify``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_surgery.cli.common import (
    AdapterOption,
    BatchOption,
    CalibrationOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    load_model,
    out,
    print_json,
    progress,
    split_values,
    token_counts,
    topology_of,
)
from llama_surgery.cli.run import calibrated
from llama_surgery.cli.verify_tables import VERDICTS, cost_table, findings_table
from llama_surgery.config import SurgeryConfig

_SAMPLES, _LIMITS = "Samples", "Limits"


def verify(
    model: ModelArgument,
    text: Annotated[
        Path,
        typer.Option(
            help="Text like what the model will read: a .txt file or a folder of them. Thresholds are set on "
            "the first quarter of each document, unless they are given."
        ),
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for adapter, answers and report. A run that stopped goes on there."
        ),
    ],
    adapter: AdapterOption = None,
    calibration_text: CalibrationOption = None,
    density: Annotated[
        float,
        typer.Option(
            help="Largest share of all (query, key) pairs that may be read from the far field.",
            rich_help_panel="Topology",
        ),
    ] = 0.06,
    length: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens: 8192 or 8k, several after commas. 8k,16k,32k,64k if left out; what is longer than "
            "the model's context is skipped.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=1,
            help="Time to spend, the loading of the model not counted. What is not reached is named.",
            rich_help_panel=_SAMPLES,
        ),
    ] = 3000.0,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="RULER tasks that need no file, several after commas. Five if left out.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Most samples of a task at a length.", rich_help_panel=_SAMPLES)
    ] = 100,
    windows: Annotated[
        int, typer.Option(min=1, help="Most perplexity windows at a length.", rich_help_panel=_SAMPLES)
    ] = 12,
    batch: BatchOption = 1,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the tokenizer's chat template. If it has one, unless told otherwise.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    seed: SeedOption = 0,
    max_perplexity: Annotated[
        float,
        typer.Option(min=0, help="Allowed rise of the perplexity, relative.", rich_help_panel=_LIMITS),
    ] = 0.01,
    max_average: Annotated[
        float,
        typer.Option(
            min=0, help="Allowed loss of the mean RULER score, points of 100.", rich_help_panel=_LIMITS
        ),
    ] = 3.0,
    max_single: Annotated[
        float,
        typer.Option(
            min=0,
            help="Allowed loss of any single task, or at any single length, points of 100.",
            rich_help_panel=_LIMITS,
        ),
    ] = 10.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Find out on your model and your text whether the operated model keeps what the dense one can do.

    Sets thresholds (or takes --adapter), then compares both models at every length: perplexity on your text
    and five RULER tasks, sample by sample, for as long as --seconds allow. The verdict goes by the bounds of
    95% intervals: kept, exceeded, or open, which more samples would decide: run the command again. Example:

    llama-surgery verify MODEL --text my-documents --out out/verify
    """
    if adapter is not None and calibration_text is not None:
        raise typer.BadParameter("--adapter holds thresholds already: leave --calibration-text out.")
    lengths = token_counts(length or ["8k", "16k", "32k", "64k"])
    from llama_surgery.text import read_texts

    texts = read_texts(text)
    calibration = [] if calibration_text is None else read_texts(calibration_text)
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter)
    deadline = time.monotonic() + seconds
    from llama_surgery.evaluation.ruler.materials import Materials
    from llama_surgery.evaluation.ruler.samples import Sampler
    from llama_surgery.evaluation.verdict import Limits
    from llama_surgery.evaluation.verify import TASKS, split_texts
    from llama_surgery.evaluation.verify import verify as verify_model

    if adapter is None and not calibration:
        calibration, texts = split_texts(texts)
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    with progress() as tell:
        if adapter is None:
            adapter = _own_adapter(llm, tokenizer, out_folder, calibration, density, tell)
        config, routers = topology_of(llm, adapter)
        report = verify_model(
            llm,
            Sampler(tokenizer, Materials.of(), seed=seed, chat=chat),
            texts=texts,
            config=config,
            routers=routers,
            folder=out_folder,
            deadline=deadline,
            lengths=lengths,
            tasks=split_values(task or TASKS),
            samples=samples,
            windows=windows,
            batch_size=batch,
            limits=Limits(perplexity=max_perplexity, average=max_average / 100, single=max_single / 100),
            progress=tell,
        )
    if json:
        print_json(report)
        return
    out.print(findings_table(report))
    out.print(cost_table(report))
    for remark in report["skipped"]:
        out.print(f"Not counted: {remark}.", soft_wrap=True, highlight=False)
    out.print(f"[bold]{VERDICTS[report['verdict']]}[/]", soft_wrap=True, highlight=False)
    out.print(f"Written: {out_folder.resolve()}", soft_wrap=True, highlight=False)


def _own_adapter(
    model: Any, tokenizer: Any, folder: Path, texts: list[str], density: float, tell: Any
) -> Path:
    """The adapter of an earlier run in ``folder``, or a new one with thresholds set on ``texts``."""
    from llama_surgery.evaluation.io import read_started
    from llama_surgery.evaluation.ruler.run import text_digest
    from llama_surgery.files import write_json
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.operate import operated

    settings = {"calibration text": text_digest(*texts), "density": density}
    if read_started(folder / "calibration.json", settings) is None:
        config = calibrated(
            model, tokenizer, SurgeryConfig(), density=density, texts=texts, length=None, progress=tell
        )
        with operated(model, config):
            save_adapter(model, folder / "adapter")
        write_json(folder / "calibration.json", {"settings": settings})
    return folder / "adapter"

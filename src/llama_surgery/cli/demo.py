"""``llama-surgery demo``."""

import time
from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli.common import (
    DeviceOption,
    Dtype,
    JsonOption,
    err,
    load_model,
    out,
    print_json,
    progress,
)
from llama_surgery.cli.run import calibrated, measured
from llama_surgery.cli.tables import summary_table
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

DENSITY = 0.06
SEED = 0


def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the report and the results.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Shorter texts and fewer samples: quicker, with rougher figures.")
    ] = False,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    """Operate on the small model that comes with the repository, and show what changed.

    Thresholds are set on one public-domain text, so that at most 6% of all pairs are read from the far
    field. Then the dense and the operated model read another text and look for planted facts in it. A table
    and an HTML report compare them. Nothing is downloaded. On two CPU cores it takes some five minutes.
    """
    started = time.perf_counter()
    folder = demo_folder()
    from llama_surgery.evaluation.needle_variants import PLAIN
    from llama_surgery.text import read_texts

    calibration = read_texts(folder / "text" / "calibration.txt")
    texts = read_texts(folder / "text" / "evaluation.txt")
    length, windows, needles = (4096, 2, 10) if fast else (8192, 3, 15)
    llm, tokenizer = load_model(str(folder / "books-26m"), device, Dtype.float32)
    with progress() as tell:
        config = calibrated(
            llm,
            tokenizer,
            SurgeryConfig(),
            density=DENSITY,
            texts=calibration,
            length=length,
            progress=tell,
        )
        _, results = measured(
            llm,
            tokenizer,
            {f"T = {config.tile}": config},
            texts=texts,
            length=length,
            windows=windows,
            needles=needles,
            needle_lengths=[n for n in (2048, 4096, 8192) if n <= length],
            needle_variants=[PLAIN],
            needle_batch=1,
            seed=SEED,
            conditions={
                "text": "demo/text/evaluation.txt",
                "thresholds": f"set on demo/text/calibration.txt for a far density of {DENSITY:.0%}",
            },
            progress=tell,
        )

    from llama_surgery.report.page import write_report
    from llama_surgery.report.results import write_results

    write_results(out_folder / "results.json", results)
    page = out_folder / "report.html"
    frontier = folder.parent / "benchmarks" / "results" / "frontier.csv"
    with err.status("Drawing the report …"):
        write_report(results, page, frontier=frontier if frontier.is_file() else None)
    if json:
        print_json(results)
        return
    out.print(summary_table(results))
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    out.print(f"Done in {minutes} min {seconds:02d} s. Open the report in a browser:")
    out.print(f"[bold]{page.resolve()}[/]", soft_wrap=True, highlight=False)


def demo_folder() -> Path:
    """The repository's ``demo`` folder: above this file in an editable install, or below the working folder.

    Raises:
        SurgeryError: It is in neither place.
    """
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "demo" / "books-26m" / "config.json").is_file():
            return root / "demo"
    raise SurgeryError(
        "the demo model was not found: it travels in the repository, not in the package. Clone the "
        "repository and run 'make demo' there."
    )

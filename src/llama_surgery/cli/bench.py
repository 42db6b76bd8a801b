"""``llama-surgery bench``."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli.common import DeviceOption, Dtype, out, token_counts
from llama_surgery.cli.topology import option

_size = functools.partial(option, "What is measured")


def bench(
    model: Annotated[
        Path, typer.Argument(help="A config.json, or the folder of a checkpoint: for its shapes.")
    ],
    length: _size(list[str] | None, "Tokens, as 32768 or 32k. May be repeated. 128k if left out.") = None,
    batch: _size(int, "Sequences of a decode step.", min=1) = 4,
    density: _size(float, "Executed far density of prefill.", min=0, max=1) = 0.05,
    decode_density: _size(float, "Executed far density of decode steps.", min=0, max=1) = 0.03,
    page_size: _size(int, "Keys of a page.") = 64,
    moment_size: _size(int, "Keys of the balls that pages are scored by.") = 64,
    tile: _size(int, "Neighbouring tokens that share a head's pages.", min=1) = 64,
    variance_pool: _size(int, "Channels whose variances are averaged.", min=1) = 1,
    steps: _size(int, "Decode steps that are timed.", min=4) = 64,
    seconds: option(None, float, "No further part begins after this many.", min=1) = 300.0,
    out_folder: option(None, Path, "Folder for the CSV file and the plot.", "--out") = Path("out/bench"),
    device: DeviceOption = "auto",
    dtype: Dtype = Dtype.bfloat16,
) -> None:
    """Time a whole model with random weights, dense and operated, on this device.

    Time to first token, decode step and peak memory of a model of these shapes, beside the fastest backend of
    PyTorch's SDPA, after a check of the answers. Rows are written as they are measured. Example:

    llama-surgery bench benchmarks/configs/llama-3.1-8b-shapes.json --length 128k
    """
    import torch

    from llama_surgery.bench.end_to_end import Task, end_to_end
    from llama_surgery.bench.plot import plot_end_to_end
    from llama_surgery.cli.common import _device
    from llama_surgery.config import SurgeryConfig

    config = SurgeryConfig(
        page_size=page_size,
        moment_size=moment_size,
        tile=tile,
        variance_pool=variance_pool,
        theta_decode=None if tile == 1 else 0.01,
    )
    lengths = token_counts(length or ["128k"])
    target, precision = _device(device), getattr(torch, "bfloat16" if dtype is Dtype.auto else dtype.value)
    tasks = [Task(config, n, batch, density, decode_density, steps) for n in lengths]
    path = out_folder / "end_to_end.csv"
    rows = end_to_end(model, tasks, path, seconds=seconds, device=target, dtype=precision)
    plot_end_to_end(rows, path.with_suffix(".svg"))
    out.print(f"Written: {out_folder.resolve()}", soft_wrap=True, highlight=False)

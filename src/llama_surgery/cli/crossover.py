"""``llama-surgery crossover``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from llama_surgery.cli.common import (
    AdapterOption,
    DeviceOption,
    Dtype,
    JsonOption,
    out,
    print_json,
    token_counts,
)


def crossover(
    *,
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a config.json: for its heads.")],
    adapter: AdapterOption = None,
    density: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Executed far density at the largest length, for which a threshold is found."
        ),
    ] = 0.06,
    length: Annotated[list[str] | None, typer.Option(help="Tokens, as 4096 or 4k. May be repeated.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the result into --adapter.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="No further length begins after this many.")] = 120.0,
    csv: Annotated[Path, typer.Option("--csv", help="CSV of the times, written as measured.")] = Path(
        "out/crossover.csv"
    ),
    device: DeviceOption = "auto",
    dtype: Dtype = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Find from which position on sparse attention is faster than dense, on this device.

    Attention of one layer of the model's shape is timed at rising lengths, dense and operated, layout and
    selection included. The result is a value for dense_until: queries below that position see everything.
    It is a position, so that no logit depends on how a text arrives. Example:

    llama-surgery crossover demo/books-26m --adapter adapter --write
    """
    if write and adapter is None:
        raise typer.BadParameter("--write needs --adapter.")
    import torch

    from llama_surgery.bench.crossover import adapter_config, heads_of, measure_crossover, write_dense_until
    from llama_surgery.cli.common import _device
    from llama_surgery.config import SurgeryConfig

    shape = heads_of(model)
    config = SurgeryConfig() if adapter is None else adapter_config(adapter)
    target = _device(device)
    if dtype is Dtype.auto:
        precision = torch.bfloat16 if target.type == "cuda" else torch.float32
    else:
        precision = getattr(torch, dtype.value)
    default = ["2k", "4k", "8k", "16k", "32k"] if target.type == "cuda" else ["512", "1k", "2k", "4k", "8k"]
    until, points = measure_crossover(
        shape,
        config,
        token_counts(length or default),
        density,
        csv,
        seconds=seconds,
        device=target,
        dtype=precision,
    )
    if write and adapter is not None:
        write_dense_until(adapter, until)
    if json:
        print_json({"dense_until": until, "points": [p._asdict() for p in points]})
        return
    table = Table(title="Attention of one layer, milliseconds", title_justify="left")
    for name in ("tokens", "dense path", "operated", "PyTorch's SDPA"):
        table.add_column(name, justify="right")
    for p in points:
        table.add_row(f"{p.length:,}", f"{p.dense_ms:.3f}", f"{p.operated_ms:.3f}", f"{p.rival_ms:.3f}")
    out.print(table)
    beyond = " (the largest measured length: nothing was gained up to there)"
    gained = until < points[-1].length
    out.print(f"dense_until = {until}{'' if gained else beyond}", highlight=False, soft_wrap=True)
    if write:
        out.print(f"Written into {adapter}.", highlight=False, soft_wrap=True)

"""``llama-surgery operate``."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_surgery.cli.common import (
    DecodeDensityOption,
    DensityOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    load_model,
    out,
    print_json,
    progress,
)
from llama_surgery.cli.run import calibrated, thresholds
from llama_surgery.cli.topology import config_for, topology_options


@functools.partial(topology_options, gumbel=True)
def operate(
    *,
    model: ModelArgument,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the adapter.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text like what the model will read: a .txt file or a folder. Needs --density."),
    ] = None,
    density: DensityOption = None,
    decode_density: DecodeDensityOption = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a calibration window. The model's context, at most 8192, if left out."
        ),
    ] = None,
    tile: Annotated[
        int,
        typer.Option(
            help="Neighbouring tokens that share what they read in prefill.", rich_help_panel="Topology"
        ),
    ] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    settings: dict[str, Any],
) -> None:
    """Operate on a model and save the operation as a small adapter folder.

    The adapter holds the topology and its thresholds, no weights. With --text and --density the thresholds
    are set on the text so that no more than that share is read from the far field; without, the documented
    defaults are saved. Use it with 'evaluate --adapter', 'generate --adapter' or load_adapter() in Python.
    """
    if (text is None) != (density is None):
        raise typer.BadParameter("--text and --density go together: thresholds are set on text.")
    if decode_density is not None and density is None:
        raise typer.BadParameter("--decode-density needs --density and --text.")
    config = config_for(settings, tile)
    from llama_surgery.text import read_texts

    texts = None if text is None else read_texts(text)
    llm, tokenizer = load_model(model, device, dtype, longest=length)
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.operate import operate as operate_on

    if texts is not None and density is not None:
        with progress() as tell:
            config = calibrated(
                llm,
                tokenizer,
                config,
                density=density,
                texts=texts,
                length=length,
                progress=tell,
                decode_density=decode_density,
            )
    operate_on(llm, config)
    save_adapter(llm, out_folder)
    if json:
        print_json({"adapter": str(out_folder), "config": config.to_dict()})
        return
    if config.topology == "pages":
        out.print(f"Thresholds: {thresholds(config)}.")
    out.print(f"Adapter: {out_folder.resolve()}", soft_wrap=True, highlight=False)

"""``llama-surgery operate``."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, load_model, topology_of
from llama_surgery.cli.console import out, print_json, progress, say, speed_told, thresholds
from llama_surgery.cli.options import SHARE, TOKENS, TOPOLOGY, config_for, refuse, topology_options


@functools.partial(topology_options, gumbel=True)
def operate(
    *,
    model: options.Model,
    out_folder: options.own(Path, "Folder for the adapter.", "--out"),
    text: options.own(
        Path | None,
        "Text like what the model will read: a .txt file or a folder. Needs --density or --max-loss.",
    ) = None,
    adapter: options.of_topology(
        Path | None,
        "Adapter to begin with: topology and what was learned stay, thresholds are set anew on --text.",
    ) = None,
    density: options.Density = None,
    max_loss: options.of_topology(
        float | None,
        "Instead of --density: how much perplexity may rise, as 1% or 0.01. What is read follows.",
        **SHARE,
    ) = None,
    decode_density: options.DecodeDensity = None,
    length: options.own(
        int | None,
        "Tokens of a calibration window. The model's context, at most 8192, if left out.",
        **TOKENS,
    ) = None,
    dense_until: options.DenseUntil = None,
    tile: options.Tile = 64,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
    settings: dict[str, Any],
) -> None:
    """Operate on a model and save the operation as a small adapter folder.

    The adapter holds the topology and its thresholds, no weights. With --text and --density the thresholds
    are set on the text so that no more than that share is read from the far field, with --max-loss instead of
    --density so that as little is read as that loss allows; without, the documented defaults are saved. What
    was learned on one kind of text serves others, thresholds do not: --adapter sets them anew. Use the result
    with 'evaluate --adapter', 'generate --adapter' or load_adapter() in Python.
    """
    if density is not None and max_loss is not None:
        raise typer.BadParameter("--density and --max-loss both set the threshold: give one of them.")
    if (text is None) != (density is None and max_loss is None):
        raise typer.BadParameter(
            "--text goes with --density or --max-loss, and they with it: thresholds are set on text."
        )
    if decode_density is not None and density is None:
        raise typer.BadParameter("--decode-density needs --density and --text.")
    if adapter is not None:
        refuse(TOPOLOGY, "--adapter holds a topology already, leave it out.")
        if text is None:
            raise typer.BadParameter(
                "--adapter needs --text with --density or --max-loss: to set thresholds."
            )
    config = config_for({**settings, "dense_until": dense_until or 0}, tile)
    from llama_surgery.text import read_texts

    texts = None if text is None else read_texts(text)
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter, longest=length)
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.context import context_length
    from llama_surgery.surgery.operate import operate as operate_on
    from llama_surgery.surgery.operation import config_of, measured_loss

    routers = None
    if adapter is not None:
        config, routers = topology_of(llm, adapter)
        config = dataclasses.replace(config, dense_until=dense_until or 0)
    began = time.monotonic()
    if texts is None:
        operate_on(llm, config)
    else:
        with progress() as tell:
            operate_on(
                llm,
                config,
                routers=routers,
                density=density,
                max_loss=max_loss,
                text=texts,
                tokenizer=tokenizer,
                length=length,
                decode_density=decode_density,
                measure_speed=dense_until is None,
                progress=tell,
            )
    save_adapter(llm, out_folder)
    config, measured = config_of(llm), measured_loss(llm)
    if json:
        told = {} if measured is None else {"measured_loss": dataclasses.asdict(measured)}
        print_json({"adapter": str(out_folder), "config": config.to_dict(), **told})
        return
    if config.topology == "pages":
        took = "" if texts is None else f", set in {time.monotonic() - began:.0f} s"
        out.print(f"Thresholds: {thresholds(config)}{took}.")
        if config.dense_until:
            say(speed_told(config.dense_until, context_length(llm)))
    if measured is not None:
        say(f"Loss: {measured}.")
    say(f"Adapter: {out_folder.resolve()}")

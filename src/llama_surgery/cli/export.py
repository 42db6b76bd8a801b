"""``llama-surgery export``."""

from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, load_model, topology_of
from llama_surgery.cli.console import escape, out, print_json, say, status, thresholds
from llama_surgery.cli.options import TOKENS


def export(
    model: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face checkpoint in safetensors, or a GGUF file.")
    ],
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="[ADAPTER] OUT",
            help="Adapter folder written by 'operate' or 'learn', if there is one, and the folder to write.",
        ),
    ],
    json: options.Json = False,
) -> None:
    """Write an operated model as a checkpoint folder for a serving engine (docs/serving.md).

    The folder holds the weights as they are, the topology in its config.json, and learned corrections
    beside them. Without an adapter the documented default topology is written, whose thresholds are not
    calibrated for your model. transformers opens the folder as the dense model.
    """
    if len(folders) > 2:
        raise typer.BadParameter("give MODEL, an ADAPTER if there is one, and OUT.")
    *adapters, target = folders
    with status(f"Exporting {escape(str(model))} …"):
        from llama_surgery.serving.export import export as write

        config = write(model, target, adapters[0] if adapters else None)
    if json:
        print_json({"folder": str(target), "config": config.to_dict()})
        return
    out.print(f"Thresholds: {thresholds(config)}.")
    say(f"Folder: {target.resolve()}")


def export_topology(
    model: options.Model,
    text: options.own(Path, "A UTF-8 text file, read from its beginning."),
    out_file: options.own(Path, "File to write, a NumPy archive (.npz).", "--out"),
    adapter: options.AdapterArgument = None,
    length: options.own(int, "Tokens of the text that are read, at most.", **TOKENS) = 8192,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
) -> None:
    """Write what every layer and head sees of a text as block-sparse arrays, for other tools and hardware.

    The file holds, for each layer and query head, the far pages that every tile of queries reads (CSR), from
    which row on, the token positions of every page and its path in the tree. docs/topology-format.md
    describes it. Without an adapter the documented default topology is used, whose thresholds are not
    calibrated for your model. Example:

    llama-surgery export-topology demo/books-26m adapter --text demo/text/evaluation.txt --out topology.npz
    """
    from llama_surgery.text import encode, leading_tokens, read_text

    document = read_text(text)
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter)
    import torch

    from llama_surgery.export.file import describe, write_topology
    from llama_surgery.export.record import record_topology
    from llama_surgery.surgery.context import check_length, check_vocabulary
    from llama_surgery.surgery.operate import operated

    config, routers = topology_of(llm, adapter)
    ids = [*leading_tokens(tokenizer), *encode(tokenizer, document)][:length]
    check_length(llm, len(ids))
    check_vocabulary(llm, torch.tensor(ids))
    with status(f"Reading {len(ids):,} tokens …"), operated(llm, config, routers=routers):
        topology = record_topology(llm, torch.tensor(ids))
    write_topology(out_file, topology)
    told = describe(topology)
    if json:
        print_json({"file": str(out_file), **told})
        return
    out.print(
        f"{told['tokens']:,} tokens in {told['tiles']:,} tiles, {told['pages']:,} pages a head; "
        f"{len(told['layers'])} layers read {told['entries']:,} pages in all, a far density of "
        f"{told['far_density']:.2%}."
    )
    say(f"Written: {out_file.resolve()}")

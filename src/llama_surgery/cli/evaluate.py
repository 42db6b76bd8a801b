"""``llama-surgery evaluate``."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_surgery.cli.common import (
    AdapterOption,
    CalibrationOption,
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
    topology_of,
)
from llama_surgery.cli.run import calibrated, measured
from llama_surgery.cli.tables import continuation_table, domain_table, needle_table, summary_table
from llama_surgery.cli.topology import config_for, topology_options

_SAMPLES = "Samples"


@functools.partial(topology_options, gumbel=True)
def evaluate(
    *,
    model: ModelArgument,
    text: Annotated[
        Path,
        typer.Option(help="Text to measure on: a .txt file or a folder of them. Not the calibration text."),
    ],
    adapter: AdapterOption = None,
    calibration_text: CalibrationOption = None,
    density: DensityOption = None,
    decode_density: DecodeDensityOption = None,
    tile: Annotated[
        int,
        typer.Option(
            min=1,
            help="Neighbouring tokens that share what they read in prefill.",
            rich_help_panel="Topology",
        ),
    ] = 64,
    also_tile: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Measure this tile size too, against the same dense run. May be repeated.",
            rich_help_panel="Topology",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a perplexity window.", rich_help_panel=_SAMPLES)
    ] = 8192,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Perplexity windows. 16 if left out, or as many as the text holds.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    needles: Annotated[
        int,
        typer.Option(
            min=0, help="Planted facts to ask for, by real generation. 0 for none.", rich_help_panel=_SAMPLES
        ),
    ] = 0,
    needle_length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of a needle prompt. May be repeated. --length if left out.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    needle_variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Harder needles: one-fact (the default), four-facts, sixteen-facts, two-asked, alike-names, "
            "or all. May be repeated.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    needle_batch: Annotated[
        int,
        typer.Option(
            min=1, help="Prompts answered together: more is faster on a GPU.", rich_help_panel=_SAMPLES
        ),
    ] = 1,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure perplexity and divergence on this text too, thresholds unchanged: a .txt file or a "
            "folder of them, or name=path. May be repeated.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    continuations: Annotated[
        int,
        typer.Option(
            min=0,
            help="Windows of --length tokens whose end the models write themselves, greedily: agreement with "
            "the dense text, repetition, length. 0 for none.",
            rich_help_panel=_SAMPLES,
        ),
    ] = 0,
    continuation_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of such an end.", rich_help_panel=_SAMPLES)
    ] = 1024,
    seed: Annotated[
        int, typer.Option(help="Same seed, same windows and prompts.", rich_help_panel=_SAMPLES)
    ] = 0,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the results as JSON, for 'llama-surgery report'.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write one row for each measured model as CSV.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    settings: dict[str, Any],
) -> None:
    """Measure an operated model against the dense one, in one run on the same text.

    Perplexity, divergence, planted facts, long texts, densities and times. The topology comes from --adapter,
    or from the options below; with --calibration-text and --density its thresholds are set first, for every
    tile size. Example:

    llama-surgery evaluate demo/books-26m --text demo/text/evaluation.txt --windows 4
    --calibration-text demo/text/calibration.txt --density 0.06 --out results.json
    """
    if (calibration_text is None) != (density is None):
        raise typer.BadParameter("--calibration-text and --density go together.")
    if adapter is not None and (density is not None or also_tile):
        raise typer.BadParameter("--adapter holds a topology already: leave --density and --also-tile out.")
    if needle_variant and not needles:
        raise typer.BadParameter(
            "--needle-variant says which needles to ask: give their number by --needles."
        )
    configs = {f"T = {t}": config_for(settings, t) for t in dict.fromkeys([tile, *(also_tile or [])])}
    from llama_surgery.evaluation.needle_variants import PLAIN, VARIANTS, check_variants
    from llama_surgery.text import read_texts

    variants = (
        list(VARIANTS) if "all" in (needle_variant or []) else list(dict.fromkeys(needle_variant or [PLAIN]))
    )
    check_variants(variants)
    from llama_surgery.evaluation.domains import evaluate_domains, read_domains
    from llama_surgery.evaluation.long_generation import long_generation

    texts = read_texts(text)
    domains = read_domains(domain or [])
    calibration = None if calibration_text is None else read_texts(calibration_text)
    llm, tokenizer = load_model(
        model, device, dtype, adapter=adapter, longest=max([length, *(needle_length or [])])
    )
    conditions = {"text": _shown(text)}
    routers = None
    if adapter is not None:
        (config, routers), conditions["adapter"] = topology_of(llm, adapter), _shown(adapter)
        configs = {f"T = {config.tile}": config}
    with progress() as tell:
        if calibration is not None and density is not None:
            for name, config in configs.items():
                configs[name] = calibrated(
                    llm,
                    tokenizer,
                    config,
                    density=density,
                    texts=calibration,
                    length=length,
                    progress=tell,
                    decode_density=decode_density if config.tile > 1 else None,
                )
            conditions["thresholds"] = f"set on {_shown(calibration_text)} for a far density of {density:.2%}"
        result, results = measured(
            llm,
            tokenizer,
            configs,
            texts=texts,
            length=length,
            windows=windows,
            needles=needles,
            needle_lengths=needle_length or None,
            needle_variants=variants,
            needle_batch=needle_batch,
            seed=seed,
            conditions=conditions,
            progress=tell,
            routers=routers,
        )
        shared: dict[str, Any] = {"configs": configs, "routers": routers, "seed": seed, "progress": tell}
        if domains:
            measured_domains = evaluate_domains(
                llm, tokenizer, domains=domains, length=length, windows=windows, **shared
            )
            results["domains"] = {name: found.to_dict() for name, found in measured_domains.items()}
        if continuations:
            written = long_generation(
                llm,
                tokenizer,
                texts=texts,
                length=length,
                new_tokens=continuation_tokens,
                count=continuations,
                **shared,
            )
            results["continuations"] = {name: found.to_dict() for name, found in written.items()}
    if out_file is not None:
        from llama_surgery.report.results import write_results

        write_results(out_file, results)
    if csv is not None:
        result.write_csv(csv)
    if json:
        print_json(results)
        return
    out.print(summary_table(results))
    if variants != [PLAIN]:
        out.print(needle_table(results))
    if domains:
        out.print(domain_table(results))
    if continuations:
        out.print(continuation_table(results))
    for path in (out_file, csv):
        if path is not None:
            out.print(f"Written: {path.resolve()}", soft_wrap=True, highlight=False)


def _shown(path: Path | None) -> str:
    """The last part of a path: where a text lies on one machine says nothing on another."""
    return "" if path is None else path.resolve().name

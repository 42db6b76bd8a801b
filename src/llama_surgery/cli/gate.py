"""``llama-surgery gate``."""

from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli.common import JsonOption, escape, out, print_json

#: Exit code of a gate that does not let pass.
CLOSED = 3


def gate(
    *,
    results: Annotated[
        Path, typer.Argument(help="results.json of 'compare', or a file of 'evaluate --out'.")
    ],
    rule: Annotated[
        str | None,
        typer.Option(help="Rule of a comparison, or name of an operated model, to judge. All if left out."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Of a comparison: what was asked for this total density alone.")
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Limit on the upper end of the 95% interval of perplexity over dense."),
    ] = None,
    max_needle_loss: Annotated[
        float | None,
        typer.Option(help="Limit on the upper 95% bound of needle accuracy lost, as a share: 0.05."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Exit with 3 when a model loses more than it may: for deployment pipelines.

    Limits are held against what the loss may be, the bound of its interval, and not against its mean: few
    samples do not pass. Example:

    llama-surgery gate out/compare/results.json --rule pages --density 0.18
    --max-perplexity-ratio 1.02 --max-needle-loss 0.05
    """
    if max_perplexity_ratio is None and max_needle_loss is None:
        raise typer.BadParameter("give --max-perplexity-ratio, --max-needle-loss or both.")
    from llama_surgery.evaluation.gate import read_losses

    losses = read_losses(results, rule, density)
    failures = [told for loss in losses for told in loss.failures(max_perplexity_ratio, max_needle_loss)]
    if json:
        print_json({"passed": not failures, "failures": failures})
    else:
        for told in failures:
            out.print(escape(told), soft_wrap=True, highlight=False)
        if not failures:
            out.print(f"Within the limits: {', '.join(loss.name for loss in losses)}.", highlight=False)
    if failures:
        raise typer.Exit(CLOSED)

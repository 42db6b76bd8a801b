"""The command line: ``llama-surgery --help``."""

import typer

from llama_surgery.cli import options
from llama_surgery.cli.commands import Command, Commands
from llama_surgery.cli.demo import demo
from llama_surgery.cli.doctor import doctor
from llama_surgery.cli.evaluate import evaluate
from llama_surgery.cli.export import export, export_topology
from llama_surgery.cli.generate import generate
from llama_surgery.cli.learn import learn
from llama_surgery.cli.operate import operate
from llama_surgery.cli.plan import plan
from llama_surgery.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    name="llama-surgery",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(version: options.Version = False) -> None:
    """Give a pre-trained language model a sparse attention topology, and take it out again.

    A dense model lets every token read every earlier one. Operated, it reads what is near in full and, of
    what is far, only the pages that matter. No weight changes, and nothing has to be trained.

    Start with **llama-surgery demo --out out/demo**: it runs on a laptop, in a few
    minutes. Exit codes: 0 done, 1 the command could not do its work (one line says why), 2 wrong usage,
    130 interrupted.
    """


for command in (demo, operate, plan, learn, evaluate, generate, export, export_topology, report, doctor):
    app.command(cls=Command)(command)

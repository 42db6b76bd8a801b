"""``python -m llama_surgery``: the command line, for launchers that start modules."""

from llama_surgery.cli import app

app()

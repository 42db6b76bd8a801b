"""Time to first token and decode step of a whole model, dense and operated: see ``--help``."""

import argparse
from pathlib import Path

import torch
from timing import end_to_end as measured
from timing.plot import plot_end_to_end

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.text import parse_length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=measured.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="config.json of the model, or its folder")
    parser.add_argument("--length", nargs="+", default=["128k"], help="tokens of the prompt, as 32768 or 32k")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a decode step")
    parser.add_argument("--density", type=float, default=0.05, help="executed far density of prefill")
    parser.add_argument("--decode-density", type=float, default=0.03, help="of decode steps")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--prefills", type=int, default=2, help="prefills that are timed")
    parser.add_argument("--seconds", type=float, default=300.0, help="no further part begins after this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/end_to_end.csv"))
    given = parser.parse_args()
    try:
        config = SurgeryConfig(page_size=given.page_size, tile=given.tile)
        tasks = [
            measured.Task(
                config,
                parse_length(length),
                given.batch,
                given.density,
                given.decode_density,
                given.steps,
                given.prefills,
            )
            for length in given.length
        ]
        rows = measured.end_to_end(
            given.config,
            tasks,
            given.out,
            seconds=given.seconds,
            device=torch.device(given.device),
            dtype=getattr(torch, given.dtype),
        )
        plot_end_to_end(rows, given.out.with_suffix(".svg"))
    except SurgeryError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()

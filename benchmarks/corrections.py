"""Times what learned corrections and summaries cost the kernels, and writes a CSV.

    python -m benchmarks.corrections --length 32k

What is timed and checked: ``llama_surgery.bench.corrections``.
"""

import argparse
from pathlib import Path

import torch

from llama_surgery.bench.corrections import bench_corrections
from llama_surgery.bench.measure import Deadline
from llama_surgery.config import SurgeryConfig
from llama_surgery.lengths import parse_length

RESULTS = Path(__file__).parent / "results" / "corrections.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=parse_length, default=1 << 15)
    parser.add_argument("--density", type=float, default=0.05, help="executed far density of the plain layer")
    parser.add_argument("--seconds", type=float, default=200.0, help="no new variant after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: PyTorch sees none.")
    config, device = SurgeryConfig(variance_pool=8), torch.device("cuda")
    deadline = Deadline(given.seconds)
    bench_corrections(
        config, given.length, given.output, density=given.density, deadline=deadline, device=device
    )


if __name__ == "__main__":
    main()

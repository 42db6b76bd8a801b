"""What the sparse path saves on a CPU: attention time against SDPA, and peak memory of a prefill.

    python benchmarks/cpu.py            # writes benchmarks/results/cpu.csv

Attention: 8 query and 2 KV heads of 64, float32, 2 threads; layout, scoring and selection included. The plan
is that of a threshold for a far density of 0.05 and differs per tile and head. Memory: peak resident set of a
process that prefills 32,768 random tokens through the demo model, dense and operated.
"""

import argparse
import dataclasses
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from llama_surgery.attention.api import attend
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.files import write_csv
from llama_surgery.topology.geometry import causal_pairs, near_pairs, summary_density
from llama_surgery.topology.layout import build_layout

ROOT = Path(__file__).parent.parent
HEADS, KV_HEADS, DIM, THREADS = 8, 2, 64, 2
LENGTHS = 2048, 4096, 8192, 32768
#: Executed far pairs over causal pairs.
DENSITY = 0.05
PREFILL = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
from llama_surgery import operate
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
if sys.argv[2] == "operated":
    operate(model)
ids = torch.randint(0, model.config.vocab_size, (1, 32768), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(ids, logits_to_keep=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def attention(length: int, repeats: int) -> dict[str, object]:
    """Times of operated and dense attention on the same tensors, in turn."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(KV_HEADS, HEADS // KV_HEADS, length, DIM, generator=generator)
    k, v = (torch.randn(KV_HEADS, length, DIM, generator=generator) for _ in range(2))
    config = SurgeryConfig()

    def operated(backend: str = "gather", stop: int = length) -> AttentionResult:
        full = stop // config.chunk_size * config.chunk_size
        layout = build_layout(k[:, :full], v[:, :full], config)
        chosen = dataclasses.replace(config, backend=backend)
        return attend(q[:, :, :stop], k[:, :stop], v[:, :stop], layout, config=chosen, start=0)

    def dense() -> torch.Tensor:
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 0)[None] for x in (k, v))
        return scaled_dot_product_attention(q.flatten(0, 1)[None], keys, values, is_causal=True)

    low, high = -20.0, 0.0  # log θ
    for _ in range(10):
        middle = (low + high) / 2
        config = dataclasses.replace(config, theta=math.exp(middle))
        low, high = (middle, high) if far_density(operated(), config) > DENSITY else (low, middle)
    check = 4096
    torch.testing.assert_close(
        operated(stop=check).out, operated("reference", check).out, rtol=1e-4, atol=1e-4
    )
    times: dict[str, list[float]] = {"operated": [], "dense": []}
    for _ in range(repeats):
        for name, run in (("operated", operated), ("dense", dense)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    result = operated()
    far = far_density(result, config)
    near = near_pairs(0, length, config, config.tile) / causal_pairs(0, length)
    return {
        "what": "attention",
        "length": length,
        "operated": statistics.median(times["operated"]),
        "dense": statistics.median(times["dense"]),
        "unit": "s",
        "ratio": statistics.median(d / o for d, o in zip(times["dense"], times["operated"], strict=True)),
        "far_density": far,
        "total_density": far + near + summary_density(config, length),
    }


def far_density(result: AttentionResult, config: SurgeryConfig) -> float:
    pairs = sum(float(plan.executed_pairs(config.page_size).double().mean()) for plan in result.plans)
    return pairs / causal_pairs(0, result.out.shape[2])


def memory(model: Path) -> dict[str, object]:
    """Peak resident set of a 32k prefill, each in a process of its own."""
    peak = {}
    for name in ("operated", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", PREFILL, str(model), name], capture_output=True, text=True, check=True
        )
        peak[name] = int(done.stdout.split()[-1]) / 2**20
    ratio = peak["operated"] / peak["dense"]
    return {"what": "peak memory of prefill", "length": 32768, **peak, "unit": "GiB", "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.csv")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [attention(length, options.repeats) for length in LENGTHS]
    rows.append(memory(ROOT / "demo" / "books-26m"))
    for row in rows:
        row |= {"threads": THREADS, "torch": torch.__version__, "machine": platform.machine()}
        print(row)
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()

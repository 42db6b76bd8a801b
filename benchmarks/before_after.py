"""Whether a change made the operated model slower: two states of the source, in turns, on one machine.

    python benchmarks/before_after.py MODEL --before COMMIT --adapter ADAPTER --text books-val --length 32k

Each state works in a process of its own, with the same model, text and thresholds. In every turn both measure
a part several times, call by call in turns, and the fastest of each counts: a machine that slows down, or has
other work for a moment, does not. The median of the turns' ratios, after ÷ before, goes to
results/before_after.csv.
Parts: a prompt, decode steps that read everything and that read pages, and a prompt a quarter as long
with gradients. The answers are compared too: by how much of their norm both states' last logits differ.
"""

import argparse
import inspect
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, cast

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results" / "before_after.csv"
#: The file of an adapter that holds its configuration.
DESCRIPTION = "adapter_config.json"
KEYS = ("model", "length", "adapter", "dtype", "before", "after", "part", "device")
COLUMNS = (
    *KEYS,
    "ratio",
    "ratio_low",
    "ratio_high",
    "before_ms",
    "after_ms",
    "turns",
    "apart",
    "far_density",
)
COLUMNS = (*COLUMNS, "torch", "triton", "transformers", "date")

#: What the slower state may take of the faster one's time.
ALLOWED = 1.03
#: Ratios of turns that differ by more than this factor come from a machine with other work.
BUSY = 1.2
#: Decode steps of a call.
STEPS = 8
#: Calls of each state in a turn, in turns, of which the fastest counts.
CALLS = 4
PARTS = ("prompt", "steps", "sparse steps", "gradients")


def work(given: argparse.Namespace) -> None:
    """One state's process: measures whenever it is asked on standard input, and answers with a line of JSON.

    It takes the package's public names alone, which both states have.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import llama_surgery as surgery

    folder, gguf = (given.model.parent, given.model.name) if given.model.is_file() else (given.model, None)
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=dtype).to(device).eval()
    model.requires_grad_(False)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in given.text)
    ids = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)(text, return_tensors="pt").input_ids
    if ids.shape[1] < given.length:
        raise SystemExit(f"--text has {ids.shape[1]:,} tokens, --length asks for {given.length:,}.")
    ids = ids[:, : given.length].to(device)
    behind = given.length - STEPS
    takes = inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in takes else "past_key_values"
    cached: list[Any] = []  # behind the prompt, for steps of the part that is measured

    @torch.inference_mode()
    def prompt() -> tuple[float, torch.Tensor]:
        return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1])

    @torch.inference_mode()
    def steps() -> tuple[float, torch.Tensor]:
        if cached:
            cached[0].crop(behind)
        else:
            cached.append(surgery.paged_cache(model))
            with cached[0].prompt(behind):
                model(input_ids=ids[:, :behind], logits_to_keep=1, use_cache=True, **{cache_name: cached[0]})
        held: dict[str, Any] = {cache_name: cached[0], "use_cache": True}
        ms, end = timed(
            lambda: [
                model(input_ids=ids[:, n : n + 1], **held).logits[0, -1] for n in range(behind, given.length)
            ][-1]
        )
        return ms / STEPS, end

    def gradients() -> tuple[float, torch.Tensor]:
        def both() -> torch.Tensor:
            embedded = model.get_input_embeddings()(ids[:, : given.length // 4]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits
            logits.float().logsumexp(-1).sum().backward()
            return embedded.grad[0, -1]

        return timed(both)

    def timed(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        torch.accelerator.synchronize() if device.type != "cpu" else None
        begin = time.perf_counter()
        end = call().float().cpu()
        return (time.perf_counter() - begin) * 1e3, end

    measured = {"prompt": prompt, "steps": steps, "sparse steps": steps, "gradients": gradients}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    loaded = None
    for line in sys.stdin:
        if (part := line.strip()) != loaded:
            if loaded:
                surgery.eject(model)
            cached.clear()
            surgery.load_adapter(model, given.adapter / part)
            loaded = part
        ms, end = measured[part]()
        far = surgery.statistics(model).far_density
        print(json.dumps({"ms": ms, "far": far, "end": end.tolist()}), file=answers, flush=True)


def adapters_of(adapter: Path, folder: Path) -> None:
    """Writes an adapter for every part to ``folder``: no row is dense, sparse steps alone choose."""
    described = json.loads((adapter / DESCRIPTION).read_text(encoding="utf-8"))
    config = described["surgery"] | {"dense_until": 0}
    for part in PARTS:
        theta = (config.get("theta_decode") or config["theta"]) if part == "sparse steps" else 0.0
        shutil.copytree(adapter, folder / part)
        written = described | {"surgery": config | {"theta_decode": theta}}
        (folder / part / DESCRIPTION).write_text(json.dumps(written), encoding="utf-8")


class Side:
    """A process that works with one state of the source.

    Args:
        source: The folder that holds the package.
        arguments: What it is to measure, as on the command line.
    """

    def __init__(self, source: Path, arguments: list[str]) -> None:
        path = os.pathsep.join((str(source), str(BENCHMARKS)))
        self._process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "before_after.py"), *arguments],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
            env={**os.environ, "PYTHONPATH": path},
        )

    def measure(self, part: str) -> dict[str, Any]:
        """Milliseconds of one call of a part, what was read since it was begun and the end of its answer."""
        print(part, file=self._process.stdin, flush=True)
        line = cast(Any, self._process.stdout).readline()
        if not line:
            raise SystemExit(
                f"{part}: a side ended with exit code {self._process.wait()}; its message is above."
            )
        return cast(dict[str, Any], json.loads(line))

    def end(self) -> None:
        cast(Any, self._process.stdin).close()
        self._process.wait()


def source_of(state: str, folder: Path) -> Path:
    """The folder of the package in a state: one that is named, or a commit's, unpacked to ``folder``."""
    if Path(state).is_dir():
        return Path(state).resolve()
    packed = subprocess.run(
        ["git", "archive", state, "src"], cwd=BENCHMARKS.parent, capture_output=True, check=False
    )
    if packed.returncode:
        raise SystemExit(f"{state} is neither a folder nor a commit: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def in_turns(sides: dict[str, Side], part: str, turns: int) -> dict[str, Any]:
    """Both states' times of a part, after one turn that compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, dict[str, Any]] = {}
    for turn in range(turns + 1):
        calls: dict[str, list[float]] = {name: [] for name in sides}
        for call in range(CALLS):
            for name in sides if (turn + call) % 2 else reversed(sides):  # neither is always the first
                last[name] = sides[name].measure(part)
                calls[name].append(last[name]["ms"])
        for name in sides if turn else ():
            times[name].append(min(calls[name]))
    ratios = sorted(after / before for before, after in zip(times["before"], times["after"], strict=True))
    ends = [last[name]["end"] for name in sides]
    return {
        **{"part": part, "turns": turns, "ratio": statistics.median(ratios)},
        **{"ratio_low": ratios[0], "ratio_high": ratios[-1]},
        **{f"{name}_ms": statistics.median(times[name]) for name in sides},
        "apart": math.dist(*ends) / max(math.hypot(*ends[0]), 1e-30),
        "far_density": last["after"]["far"],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="checkpoint folder or GGUF file")
    add("--before", required=True, help="a commit, or a folder that holds the package")
    add("--after", help="the same; the working tree if left out")
    add(
        "--adapter",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="whose thresholds and corrections are read with",
    )
    add("--text", type=Path, required=True, nargs="+", metavar="FILE")
    add("--length", type=int, default=32768, help="tokens of the prompt")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--turns", type=int, default=15)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", default="cuda")
    add("--out", type=Path, default=RESULTS)
    add("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.work:
        work(given)
        return 0
    import torch
    from csv_tables import merge
    from timing.measure import environment

    slower = False
    names = {
        "model": given.model.resolve().name,
        "length": given.length,
        "adapter": given.adapter.resolve().name,
    }
    names |= {
        "dtype": given.dtype,
        "before": Path(given.before).name,
        "after": Path(given.after).name if given.after else "working tree",
    }
    names |= environment(torch.device(given.device))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        adapters_of(given.adapter, folder / "adapters")
        told = [*sys.argv[1:], "--adapter", str(folder / "adapters"), "--work"]
        sides = {
            name: Side(source_of(state, folder / name), told)
            for name, state in (
                ("before", given.before),
                ("after", given.after or str(BENCHMARKS.parent / "src")),
            )
        }
        for part in given.parts:
            row = names | in_turns(sides, part, given.turns)
            row = {
                key: float(f"{value:.4g}") if isinstance(value, float) else value
                for key, value in row.items()
            }
            merge(given.out, [row], COLUMNS, KEYS, lambda key: key)
            slower |= row["ratio"] > ALLOWED
            low, high = row["ratio_low"], row["ratio_high"]
            print(
                f"{part}: after ÷ before {row['ratio']:.3f} ({low:.3f} … {high:.3f}, "
                f"{given.turns} turns), {row['after_ms']:.1f} ms, answers apart by {row['apart']:.1e}"
                + (f": MORE THAN {ALLOWED - 1:.0%} SLOWER" if row["ratio"] > ALLOWED else "")
                + (" (turns differ much: is the machine busy?)" if high > BUSY * low else ""),
                flush=True,
            )
        for side in sides.values():
            side.end()
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())

"""Times vLLM on a GPU, dense or with the plugin, and writes a CSV.

    python benchmarks/serving_gpu.py --mode dense --out out/serving.csv
    python benchmarks/serving_gpu.py --mode operated --part first --lengths 2k 32k --out out/serving.csv
    python benchmarks/serving_gpu.py --mode sparse --lengths 32k 128k --out out/serving.csv

The model has the shapes of a ``config.json`` and random weights, the same in all modes: times, no answers.
Dense is the engine as it comes, with CUDA graphs for decode steps; operated reads prompts sparsely and
decodes densely, sparse does both sparsely. Parts: ``first``, the time to the first token of a prompt that is
not cached; ``decode``, the time of a step and that to the first tokens of prompts that are cached; ``load``,
tokens written per second of 16 requests at once, none of them cached. θ is set such that the executed far
density of a prompt is what was asked for, and that of decode steps alike, before their graphs are captured
anew; each row has the density that came out. Rows are appended.
"""

import argparse
import csv
import datetime
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

COLUMNS = (
    "engine", "version", "model", "mode", "length", "batch", "far_density", "ttft_ms", "cached_ms",
    "tpot_ms", "tokens_per_s", "kv_tokens", "theta", "dense_until", "device", "date",
)  # fmt: skip
#: Tokens that a decode step's time is taken from.
STEPS = 128
SHAPES = Path(__file__).parent / "configs" / "llama-3.1-8b-shapes.json"


def write_folder(shapes: Path, folder: Path, mode: str, dense_until: int) -> None:
    """An exported folder without weights, or the dense one."""
    from llama_surgery import SurgeryConfig
    from llama_surgery.serving.families import BLOCK, BLOCK_VERSION, exported_architecture

    config = json.loads(shapes.read_text(encoding="utf-8"))
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if mode != "dense":
        theta_decode = 0.01 if mode == "sparse" else 0.0
        surgery = SurgeryConfig(theta=0.01, theta_decode=theta_decode, dense_until=dense_until)
        config["architectures"] = [exported_architecture(config, str(shapes))]
        config[BLOCK] = {"version": BLOCK_VERSION, "config": surgery.to_dict(), "routers": {}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def draw_weights(model: Any) -> None:
    """Weights as transformers draws them: the engine's own are so small that all keys weigh alike."""
    import torch

    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            elif "norm" in name:
                weight.fill_(1)


class Bench:
    """One engine and what is asked of it.

    Args:
        given: The command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        from vllm import LLM, __version__

        self.given, self.random, self.began = given, random.Random(0), time.perf_counter()
        folder = Path(tempfile.mkdtemp()) / given.config.stem
        write_folder(given.config, folder, given.mode, given.dense_until)
        options: dict[str, Any] = {}
        if given.graphs == "decode":
            sizes = [1, 2, 4, 8, 16]
            options["compilation_config"] = {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes,
            }  # fmt: skip
        self.engine = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=given.context,
            max_num_seqs=16,
            max_num_batched_tokens=given.step,
            gpu_memory_utilization=given.memory,
            enable_prefix_caching=True,
            enforce_eager=given.graphs == "none",
            **options,
        )
        self.engine.apply_model(draw_weights)
        self.count(False)
        cache = self.engine.llm_engine.vllm_config.cache_config
        self.theta = self.density = 0.0
        self.step_density: float | None = None
        self.replaced: list[Any] = []
        self.theta_length = 0
        self.row = {
            "engine": "vllm", "version": __version__, "model": given.config.stem, "mode": given.mode,
            "kv_tokens": cache.num_gpu_blocks * cache.block_size, "device": device_name(),
            "date": datetime.date.today().isoformat(),
            "dense_until": given.dense_until if given.mode != "dense" else "",
        }  # fmt: skip
        say(f"engine up, {self.spent():.0f} s; {self.row['kv_tokens']} tokens of KV cache")

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def prompt(self, length: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self.random.randrange(2, 100_000) for _ in range(length)]}

    def write(self, prompts: list[dict[str, list[int]]], new: int) -> float:
        """Seconds until all have written ``new`` tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        outs = self.engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(out.outputs[0].token_ids) == new for out in outs)
        return seconds

    def count(self, on: bool) -> None:
        """Let all layers count what they read, not one a step as a server does: random ones differ.

        Or none, while times are taken: to count takes the host as long as to launch a layer's attention.
        """
        for layer in self._layers():
            layer.engine.next_turn = lambda: None
            layer.counters.resting = not on
            layer.counters.reset()  # the engine counts its own trial steps as it starts

    def read(self, tile: int | None = None) -> float:
        """Executed far density since the last time, of rows in tiles of so many queries alone if given."""
        from llama_surgery.surgery.statistics import summarise

        layers = self._layers()
        layers[0].engine.settle()
        counted = {index: layer.counters.reset()[0] for index, layer in enumerate(layers)}
        found = summarise(counted, layers[0].executor.config.page_size)
        return found.far_density if tile is None else found.by_tile[str(tile)]["far_density"]

    def _layers(self) -> list[Any]:
        context = self.engine.llm_engine.vllm_config.compilation_config.static_forward_context
        return [layer.surgery for layer in context.values() if hasattr(layer, "surgery")]

    def set_theta(self, length: int) -> None:
        """Find θ for prompts of ``length`` tokens."""
        if self.given.mode == "dense":
            return
        if length <= self.given.dense_until:
            self.density = 0.0
            return
        prompt, low, high = self.prompt(length), math.log(1 / length), math.log(1024 / length)
        if self.theta:  # of a shorter prompt: shares fall as the length grows
            middle = math.log(self.theta * self.theta_length / length)
            low, high = middle - math.log(2), middle + math.log(2)
        self.theta_length, wanted = length, self.given.density
        self.count(True)
        for _ in range(self.given.halvings):
            self.theta = self.given.theta or math.exp((low + high) / 2)
            for layer in self._layers():  # the configuration is the layers' own: a server's never changes
                object.__setattr__(layer.executor.config, "theta", self.theta)
            self.engine.reset_prefix_cache()
            seconds, self.density = self.write([prompt], 1), self.read()
            say(f"{length} tokens, θ {self.theta:.3e}: far density {self.density:.4f}, {seconds:.2f} s")
            if self.given.theta or abs(self.density - wanted) < 0.1 * wanted:
                break
            low, high = (math.log(self.theta), high) if self.density > wanted else (low, math.log(self.theta))
        self.count(False)

    def set_theta_decode(self, length: int, prompt: dict[str, list[int]]) -> None:
        """Find θ for decode steps behind a prompt, step by step without graphs; then capture them with it."""
        self.step_density = None
        if self.given.mode != "sparse" or length <= self.given.dense_until:
            return
        runners: list[Any] = []
        self.engine.collective_rpc(lambda worker: runners.append(worker.model_runner))
        graphs = runners[0].cudagraph_manager
        graphs._graphs_captured = False
        low, high = math.log(self.theta / 256), math.log(self.theta * 4)
        self.write([prompt], 1)
        for _ in range(self.given.halvings):
            theta = math.exp((low + high) / 2)
            for layer in self._layers():
                object.__setattr__(layer.executor.config, "theta_decode", theta)
            self.read()
            self.write([prompt], 9)
            self.step_density = self.read(1)
            say(f"{length} tokens, θ of steps {theta:.3e}: far density {self.step_density:.4f}")
            if abs(self.step_density - self.given.density) < 0.1 * self.given.density:
                break
            more = self.step_density > self.given.density
            low, high = (math.log(theta), high) if more else (low, math.log(theta))
        self.replaced.append(dict(graphs.graphs))  # new graphs go into the memory that these hold
        graphs.graphs.clear()
        runners[0].capture_model()

    def measure(self, length: int, parts: list[str], batches: list[int]) -> None:
        """Time to the first token of prompts that are not cached, then the steps that go on from there."""
        samples = self.given.samples if length <= 32768 else 1
        prompts = [self.prompt(length) for _ in range(max(samples, *batches))]
        if length <= 32768:
            self.write([self.prompt(length)], 1)
        times = [self.write([prompt], 1) for prompt in prompts]
        say(f"first token, {length} tokens: {', '.join(f'{1000 * x:.1f}' for x in times)} ms")
        if "first" in parts:
            self.add(length, 1, ttft_ms=1000 * statistics.median(times))
        if "decode" in parts:
            self.set_theta_decode(length, prompts[0])
        for batch in batches if "decode" in parts else []:
            self.decode(length, prompts[:batch])

    def decode(self, length: int, prompts: list[dict[str, list[int]]]) -> None:
        """Time to the first tokens of prompts that are cached, and of the decode steps that follow."""
        self.write(prompts, STEPS // 4)
        short = [self.write(prompts, 1) for _ in range(5)]
        long = [self.write(prompts, STEPS + 1) for _ in range(3)]
        cached = statistics.median(short)
        step = (statistics.median(long) - cached) / STEPS
        steps = {"tpot_ms": 1000 * step, "tokens_per_s": len(prompts) / step}
        self.add(length, len(prompts), cached_ms=1000 * cached, **steps)

    def load(self, length: int, batch: int, new: int = 256) -> None:
        """Tokens written per second of ``batch`` requests at once, none of them cached."""
        self.engine.reset_prefix_cache()
        seconds = self.write([self.prompt(length) for _ in range(batch)], new)
        self.add(length, batch, tokens_per_s=batch * new / seconds)

    def add(self, length: int, batch: int, **measured: float) -> None:
        """Append a row."""
        row = dict.fromkeys(COLUMNS, "") | self.row | {"length": length, "batch": batch}
        row |= {name: f"{value:.5g}" for name, value in measured.items()}
        if self.given.mode != "dense":
            steps = self.step_density if "tpot_ms" in measured else None
            density = self.density if steps is None else steps
            row |= {"far_density": f"{density:.4f}", "theta": f"{self.theta:.3e}"}
        say(
            f"{self.spent():.0f} s "
            + " ".join(f"{name}={value}" for name, value in row.items() if value != "")
        )
        self.given.out.parent.mkdir(parents=True, exist_ok=True)
        new = not self.given.out.exists()
        with self.given.out.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def say(line: str) -> None:
    print(f"SERVING {line}", flush=True)


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    from llama_surgery.text import parse_length

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=SHAPES, help="config.json of the shapes")
    parser.add_argument("--mode", choices=["dense", "operated", "sparse"], required=True)
    parser.add_argument("--part", nargs="+", choices=["first", "decode", "load"], default=["first", "decode"])
    parser.add_argument("--lengths", nargs="+", type=parse_length, default=[2048, 8192, 32768, 131072])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="sequences of a decode step")
    parser.add_argument("--density", type=float, default=0.05, help="executed far density")
    parser.add_argument("--theta", type=float, default=0.0, help="θ, where it is known; else found")
    parser.add_argument("--halvings", type=int, default=9, help="attempts to find θ")
    parser.add_argument(
        "--dense-until", type=parse_length, default=8192, help="positions that see everything"
    )
    parser.add_argument("--context", type=parse_length, default=140000, help="--max-model-len of the engine")
    parser.add_argument("--step", type=parse_length, default=16384, help="--max-num-batched-tokens")
    parser.add_argument("--memory", type=float, default=0.9, help="--gpu-memory-utilization of the engine")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--graphs", choices=["decode", "default", "none"], default="decode")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="no further measurement begins after this"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # the model is read and changed in this process
    bench = Bench(given)
    for length in given.lengths:
        if bench.spent() > given.seconds:
            say(f"{given.seconds:.0f} s are over, {length} tokens and what follows are left out")
            break
        bench.set_theta(length)
        if set(given.part) & {"first", "decode"}:
            bench.measure(length, given.part, given.batch)
        if "load" in given.part and bench.spent() < given.seconds:
            bench.load(length, 16)
    say(f"done, {bench.spent():.0f} s")


if __name__ == "__main__":
    main()

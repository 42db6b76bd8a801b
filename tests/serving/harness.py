"""A real server process, and what transformers' own generate() writes for the same prompts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tests.ports import free_port

from llama_surgery import SurgeryConfig, eject, operate, save_adapter
from llama_surgery.serving.export import export
from llama_surgery.topology.router import PageRouter

#: θ at far density 0.06 on the demo model: what `llama-surgery operate demo/books-26m --text
#: demo/text/calibration.txt --density 0.06` prints, to four digits.
SPARSE = SurgeryConfig(theta=0.04505, theta_decode=0.007155)
DENSE_LIMIT = SurgeryConfig(theta=0.0, theta_decode=0.0)
#: Tokens that every request writes.
NEW = 16
START_SECONDS = 240
#: Two logits of the dense model that differ by less may change places by rounding.
TIE = 1e-4


class Server:
    """A server in a process group of its own.

    Args:
        model: The exported folder.
        log: File for what it prints.
        options: Further options of ``vllm serve``.
        environment: Further variables of its environment.
    """

    def __init__(self, model: Path, log: Path, *options: str, **environment: str) -> None:
        self.model, self.log, self.options = model, log, options
        self.environment = environment
        self.process: subprocess.Popen | None = None

    def launch(self) -> None:
        self.port = free_port()
        command = [
            str(Path(sys.executable).with_name("vllm")),
            *("serve", str(self.model), "--served-model-name", "books", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--dtype", "float32", "--max-num-batched-tokens", "512"),
            *("--enforce-eager", *self.options),
        ]
        environment = {
            # The interpreter is for tests of the kernels in this process.
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "VLLM_LOG_STATS_INTERVAL": "1",
            **self.environment,
        }
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def wait(self) -> int | None:
        """Until the server answers (None) or has ended (its exit status)."""
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            status = self.process.poll()
            if status is not None:
                return status
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return None
            except OSError:
                time.sleep(0.5)
        self.kill()
        raise AssertionError(f"no answer after {START_SECONDS} s:\n{self.text()[-3000:]}")

    def start(self) -> "Server":
        self.launch()
        status = self.wait()
        assert status is None, f"the server ended with {status}:\n{self.text()[-5000:]}"
        return self

    def kill(self) -> None:
        """End the whole process group at once, as a crash would."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def wait_for(self, condition: Callable[[float], bool], seconds: float = 60) -> bool:
        """Whether the number of running requests fulfils ``condition`` within ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition(self.metric("vllm:num_requests_running")):
                return True
            time.sleep(0.1)
        return False

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=300)


def complete(client: Any, prompt: list[int], new: int = NEW, *, dense: bool = False) -> list[int]:
    """Greedy token ids that the server writes after ``prompt``, operated or dense."""
    answer = client.completions.create(
        model="books",
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        extra_body={
            "return_token_ids": True,
            "ignore_eos": True,
            "vllm_xargs": {"llama_surgery_dense": int(dense)},
        },
    )
    return answer.choices[0].token_ids


@dataclasses.dataclass
class Reference:
    """The same model in transformers, float32."""

    model: Any
    text: list[int]
    summary: list[str]  # a line for every acceptance point, printed when the tests are over
    tie: float = TIE

    def prompts(self, count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
        """Runs of real text: lengths on a logarithmic scale, more of them short than long."""
        generator = torch.Generator().manual_seed(seed)
        steps = torch.linspace(0, 1, count) ** 1.5
        lengths = (shortest * (longest / shortest) ** steps).round().int().tolist()
        starts = torch.randint(0, len(self.text) - longest, (count,), generator=generator).tolist()
        return [self.text[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def write(
        self,
        prompts: list[list[int]],
        config: SurgeryConfig | None,
        new: int = NEW,
        routers: Mapping[int, PageRouter] | None = None,
    ) -> list[list[int]]:
        """What generate() writes after every prompt: the operated model, or the dense one for None."""
        if config is not None:
            operate(self.model, config, routers=routers)
        try:
            return [self._generate(prompt, new) for prompt in prompts]
        finally:
            if config is not None:
                eject(self.model)

    def _generate(self, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt], device=self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def margin(self, ids: list[int]) -> float:
        """Dense logit of the likeliest next token less that of the second."""
        batch = torch.tensor([ids], device=self.model.device)
        best = self.model(batch, use_cache=False, logits_to_keep=1).logits[0, -1].topk(2).values
        return float(best[0] - best[1])

    def assert_equal(
        self, what: str, prompts: list[list[int]], want: list[list[int]], got: list[list[int]]
    ) -> None:
        """Equal tokens, or a first divergence where the dense model itself has a tie."""
        told, wrong = [], 0
        for prompt, expected, answer in zip(prompts, want, got, strict=True):
            assert len(answer) == len(expected)
            if expected == answer:
                continue
            at = next(i for i, pair in enumerate(zip(expected, answer, strict=True)) if pair[0] != pair[1])
            margin = self.margin(prompt + expected[:at])
            wrong += margin >= self.tie
            told.append(f"prompt of {len(prompt)} at new token {at}, dense margin {margin:.1e}")
        lengths, tokens = [len(prompt) for prompt in prompts], sum(map(len, want))
        line = (
            f"{what}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {tokens} new ones, "
            f"{len(told)} divergences"
        )
        self.summary.append(": ".join((line, *filter(None, ["; ".join(told)]))))
        assert not wrong, f"{wrong} divergences where the dense model has no tie. {self.summary[-1]}"


def exported(model: Any, source: Path, folder: Path, config: SurgeryConfig, routers: Any = None) -> Path:
    """The checkpoint ``source`` of ``model``, operated and exported under ``folder``."""
    operate(model, config, routers=routers)
    try:
        save_adapter(model, folder / "adapter")
    finally:
        eject(model)
    export(source, folder / "served", folder / "adapter")
    return folder / "served"


def post(server: Server, path: str, body: bytes) -> int:
    """HTTP status of a raw request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def post_json(server: Server, path: str, **fields: Any) -> int:
    return post(server, path, json.dumps({"model": "books", **fields}).encode())

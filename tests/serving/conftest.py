"""A real server process, and what transformers' own generate() writes for the same prompts."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, eject, operate, save_adapter
from llama_surgery.serving.export import export
from llama_surgery.text import encode

#: θ at far density 0.06 on the demo model: what `llama-surgery operate demo/books-26m --text
#: demo/text/calibration.txt --density 0.06` prints, to four digits.
SPARSE = SurgeryConfig(theta=0.04505, theta_decode=0.007155)
DENSE_LIMIT = SurgeryConfig(theta=0.0, theta_decode=0.0)
#: Tokens that every request writes.
NEW = 16
START_SECONDS = 240

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            str(Path(sys.executable).with_name("vllm")),
            *("serve", str(self.model), "--served-model-name", "books", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--dtype", "float32", "--max-num-batched-tokens", "512"),
            *("--enforce-eager", *self.options),
        ]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "2",
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

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=300)


def complete(client: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy token ids that the server writes after ``prompt``."""
    answer = client.completions.create(
        model="books",
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return answer.choices[0].token_ids


@dataclasses.dataclass
class Reference:
    """The same model in transformers, float32."""

    model: Any
    tokenizer: Any
    text: list[int]

    def prompts(self, count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
        """Runs of real text, lengths spread evenly on a logarithmic scale."""
        generator = torch.Generator().manual_seed(seed)
        steps = torch.linspace(0, 1, count)
        lengths = (shortest * (longest / shortest) ** steps).round().int().tolist()
        starts = torch.randint(0, len(self.text) - longest, (count,), generator=generator).tolist()
        return [self.text[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def write(
        self, prompts: list[list[int]], config: SurgeryConfig | None, new: int = NEW
    ) -> list[list[int]]:
        """What generate() writes after every prompt: the operated model, or the dense one for None."""
        if config is not None:
            operate(self.model, config)
        try:
            return [self._generate(prompt, new) for prompt in prompts]
        finally:
            if config is not None:
                eject(self.model)

    def _generate(self, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
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
        best = self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].topk(2).values
        return float(best[0] - best[1])

    def assert_equal(self, prompts: list[list[int]], want: list[list[int]], got: list[list[int]]) -> None:
        """Equal tokens, or a first divergence where the dense model itself has a tie (margin < 1e-4)."""
        wrong = []
        for prompt, expected, answer in zip(prompts, want, got, strict=True):
            if expected == answer:
                continue
            at = next(i for i, pair in enumerate(zip(expected, answer, strict=True)) if pair[0] != pair[1])
            margin = self.margin(prompt + expected[:at])
            if margin >= 1e-4:
                wrong.append(f"prompt of {len(prompt)}: token {at} differs, dense margin {margin:.2e}")
        assert not wrong, f"{len(wrong)} of {len(prompts)}: " + "; ".join(wrong)


@pytest.fixture(scope="session")
def reference(demo_model_path: Path) -> Reference:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    text = (demo_model_path.parent / "text" / "evaluation.txt").read_text(encoding="utf-8")
    return Reference(model, tokenizer, encode(tokenizer, text))


def exported(model: Any, source: Path, folder: Path, config: SurgeryConfig, routers: Any = None) -> Path:
    """The checkpoint ``source`` of ``model``, operated and exported under ``folder``."""
    operate(model, config, routers=routers)
    try:
        save_adapter(model, folder / "adapter")
    finally:
        eject(model)
    export(source, folder / "served", folder / "adapter")
    return folder / "served"


@pytest.fixture(scope="session")
def sparse_folder(reference: Reference, demo_model_path: Path, tmp_path_factory: Any) -> Path:
    return exported(reference.model, demo_model_path, tmp_path_factory.mktemp("sparse"), SPARSE)


@pytest.fixture(scope="session")
def dense_limit_folder(reference: Reference, demo_model_path: Path, tmp_path_factory: Any) -> Path:
    return exported(reference.model, demo_model_path, tmp_path_factory.mktemp("theta0"), DENSE_LIMIT)


@pytest.fixture(scope="module")
def server(sparse_folder: Path, tmp_path_factory: Any) -> Iterator[Server]:
    """The operated demo model, far density 0.06; chunked prefill (512) and prefix caching are on."""
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    server = Server(sparse_folder, folder / "log.txt", "--chat-template", str(template)).start()
    try:
        yield server
    finally:
        server.kill()
        for line in server.text().splitlines():
            if "llama-surgery" in line or "Prefix cache hit rate" in line:
                print(line[:300])


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

"""Planted facts, asked of a server over HTTP and of the same model in transformers.

    vllm serve served --port 8002 &
    python benchmarks/serving_facts.py MODEL --adapter ADAPTER --url http://127.0.0.1:8002 --text python-code

``served`` is what ``llama-surgery export MODEL ADAPTER served`` wrote. Every fact is asked twice, operated
and dense (``llama_surgery_dense`` of the request), with greedy decoding. A row for each mode goes to --out:
how many facts the server and ``generate()`` answer, and how many of their answers differ. Where they do,
the gap says how much likelier, in logits, transformers finds its own token than the server's: two correct
programs part where that is small. The exit code is 1 if one gap is wider than --tie.
"""

import argparse
import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from csv_tables import RESULTS, merge
from real_model import RealModel, real_model, text_name
from real_samples import split

import llama_surgery
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import environment
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.kept import adapter_digest
from llama_surgery.evaluation.needle import NeedlePrompt, needle_prompts
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import parse_length

KEYS = ("engine", "model", "adapter", "theta", "mode", "text", "length", "dtype", "seed")
COLUMNS = (
    *(*KEYS, "asked", "right_served", "right", "differ", "beyond_tie", "largest_gap", "tie"),
    *("device", "date"),
)
MODES = ("operated", "dense")


class Server:
    """A server that speaks OpenAI's protocol.

    Args:
        url: Without ``/v1``.

    Raises:
        SurgeryError: Nothing answers there.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.version = "vllm " + self._ask("/version")["version"]
        self._model = self._ask("/v1/models")["data"][0]["id"]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise SurgeryError(f"{self._url}{path}: {error}. Is a vLLM server running there?") from error

    def answer(self, prompt: NeedlePrompt, dense: bool) -> tuple[int, ...]:
        """As many tokens as the fact has, the likeliest ones."""
        asked = {
            **{"model": self._model, "prompt": list(prompt.input_ids), "max_tokens": len(prompt.answer_ids)},
            **{"temperature": 0, "ignore_eos": True, "return_token_ids": True},
            "vllm_xargs": {"llama_surgery_dense": int(dense)},
        }
        return tuple(self._ask("/v1/completions", asked)["choices"][0]["token_ids"])


@torch.no_grad()
def gap(model: torch.nn.Module, prompt: NeedlePrompt, own: Sequence[int], other: Sequence[int]) -> float:
    """Logits by which a model prefers its own token where two answers part."""
    at = next(i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
    ids = torch.tensor([[*prompt.input_ids, *own[:at]]], device=inner_model(model).device)
    cache = llama_surgery.paged_cache(model) if llama_surgery.is_operated(model) else None
    with contextlib.nullcontext() if cache is None else cache.prompt(len(prompt.input_ids)):
        held = {} if cache is None else {cache_name(inner_model(model)): cache, "use_cache": True}
        logits = model(input_ids=ids, logits_to_keep=1, **held).logits[0, -1].float()
    return (logits[own[at]] - logits[other[at]]).item()


def compared(
    real: RealModel, mode: str, prompts: Sequence[NeedlePrompt], served: Sequence[tuple[int, ...]], tie: float
) -> dict[str, Any]:
    """What transformers answers in a mode, beside the server's answers."""
    operated = llama_surgery.operated(real.model, real.config, routers=real.routers)
    with operated if mode == "operated" else contextlib.nullcontext():
        own = [
            tuple(continue_greedily(real.model, [prompt.input_ids], len(prompt.answer_ids))[0])
            for prompt in prompts
        ]
        gaps = [
            gap(real.model, prompt, mine, theirs)
            for prompt, mine, theirs in zip(prompts, own, served, strict=True)
            if mine != theirs[: len(mine)]  # generate() stops where a text ends
        ]
    right = [
        sum(answer == prompt.answer_ids for answer, prompt in zip(answers, prompts, strict=True))
        for answers in (served, own)
    ]
    return {
        **{"asked": len(prompts), "right_served": right[0], "right": right[1], "differ": len(gaps)},
        **{"beyond_tie": sum(one > tie for one in gaps), "largest_gap": max(gaps, default=""), "tie": tie},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", help="checkpoint folder")
    add(
        "--adapter", type=Path, required=True, metavar="FOLDER", help="what the server's folder was made with"
    )
    add("--url", default="http://127.0.0.1:8000", help="of the server")
    add("--text", type=Path, required=True, metavar="FOLDER", help="every other document holds facts")
    add("--length", default="30k", help="tokens of a prompt, as 8192 or 8k")
    add("--facts", type=int, default=100)
    add("--at-once", type=int, default=8, help="requests at a time")
    add("--tie", type=float, default=0.25, help="gap of logits that rounding explains")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="as the server's")
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS / "serving_facts.csv")
    given = parser.parse_args()
    try:
        server = Server(given.url)
        real = real_model(given.model, given.device, given.dtype, given.adapter)
        length = parse_length(given.length)
        prompts = needle_prompts(
            real.tokenizer, split(given.text, None)[1], count=given.facts, lengths=[length], seed=given.seed
        )
        wide = 0
        for mode in MODES:
            with ThreadPoolExecutor(given.at_once) as pool:
                served = list(
                    pool.map(lambda prompt, mode=mode: server.answer(prompt, mode == "dense"), prompts)
                )
            found = compared(real, mode, prompts, served, given.tie)
            wide += found["beyond_tie"]
            row = {
                **{"engine": server.version, "model": real.name, "mode": mode, "text": text_name(given.text)},
                **{
                    "adapter": adapter_digest(SurgeryConfig(), real.routers or {}),
                    "theta": real.config.theta,
                },
                **{"length": length, "dtype": given.dtype, "seed": given.seed, **found},
                **{"device": environment(real.model)["device"], "date": time.strftime("%Y-%m-%d")},
            }
            merge(given.out, [row], COLUMNS, KEYS, lambda key: key)
            print(
                f"{mode}: of {found['asked']} facts the server answers {found['right_served']}, generate() "
                f"{found['right']}; {found['differ']} answers differ, {found['beyond_tie']} of them by more "
                "than a tie",
                flush=True,
            )
    except SurgeryError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return int(wide > 0)


if __name__ == "__main__":
    sys.exit(main())

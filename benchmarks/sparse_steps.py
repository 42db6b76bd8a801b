"""What long runs of decode steps lose: a text read one token at a time behind a prompt, dense beside it.

    python benchmarks/sparse_steps.py MODEL --text python-code --prompt 8k 30k --steps 1024 --adapter ADAPTER

Windows of the text are read as a prompt and then token by token, whatever the model would have said itself
(teacher forcing), so that nothing but decode steps differs. The operated model is measured twice: with steps
that read everything, which shows what the prompt's pages and rounding cost, and with steps that read pages at
--decode-density. Rows go to --out: perplexity over that of the dense model on the same tokens, with a 95%
interval over windows, the mean divergence of the distributions, and both in quarters of the steps, where an
upward drift would show.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from csv_tables import RESULTS, merge
from real_forms import DTYPE, by_decode
from real_model import RealModel, real_model, text_name
from real_samples import split
from torch import nn

import llama_surgery
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.kept import adapter_digest
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.operation import config_of, paged_cache, reset_statistics, routers_of, statistics
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import parse_length, windows

QUARTERS = 4
KEYS = ("model", "text", "prompt", "steps", "settings", "decode")
COLUMNS = (
    *KEYS,
    *("prompt_far_density", "far_density", "total_density", "ratio", "ratio_low", "ratio_high", "divergence"),
    *(f"ratio_{quarter}" for quarter in range(1, QUARTERS + 1)),
    *(f"divergence_{quarter}" for quarter in range(1, QUARTERS + 1)),
    *("windows", "seed", "dtype", "device", "date"),
)


@torch.no_grad()
def dense_logits(model: nn.Module, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the dense model for every token behind the prompt, (steps, vocabulary), in one pass.

    Args:
        model: Dense.
        ids: (prompt + steps,), int64.
        prompt: Tokens of the prompt.
    """
    kept = len(ids) - prompt
    return model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=kept).logits[0]


@torch.no_grad()
def step_losses(
    model: nn.Module, ids: torch.Tensor, prompt: int, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The operated model's loss and its divergence from the dense one, step by step.

    Args:
        model: Operated.
        ids: (prompt + steps,), int64.
        prompt: Tokens of the prompt; the first row is its end's.
        dense: (steps, vocabulary).

    Returns:
        Losses in nats, KL(dense ‖ operated) in nats, each (steps,), float64, on the CPU, and the far density
        of the prompt.
    """
    cache, losses, divergences = paged_cache(model), [], []
    held = {cache_name(inner_model(model)): cache, "use_cache": True}
    reset_statistics(model)
    with cache.prompt(prompt):
        logits = model(input_ids=ids[None, :prompt], logits_to_keep=1, **held).logits[0]
    far = statistics(model).far_density
    reset_statistics(model)
    for step in range(len(dense)):
        likely, own = (torch.log_softmax(x.float(), -1) for x in (dense[step], logits[-1]))
        losses.append(-own[ids[prompt + step]])
        divergences.append((likely.exp() * (likely - own)).sum())
        if step + 1 < len(dense):
            token = ids[None, prompt + step : prompt + step + 1]
            logits = model(input_ids=token, **held).logits[0]
    return torch.stack(losses).double().cpu(), torch.stack(divergences).double().cpu(), far


def rows_of(
    real: RealModel,
    given: argparse.Namespace,
    texts: list[str],
    prompt: int,
    configs: dict[str, SurgeryConfig],
) -> list[dict[str, Any]]:
    """Rows of a prompt's length, one for each way to decode."""
    model, device = real.model, inner_model(real.model).device
    ids = windows(real.tokenizer, texts, prompt + given.steps, given.windows, given.seed).to(device)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {name: [] for name in configs}
    read: dict[str, list[Any]] = {name: [] for name in configs}
    dense = []
    for window in ids:
        logits = dense_logits(model, window, prompt)
        dense.append(torch.nn.functional.cross_entropy(logits.float(), window[prompt:], reduction="none"))
        for name, config in configs.items():
            with llama_surgery.operated(model, config, routers=real.routers):
                found[name].append(step_losses(model, window, prompt, logits))
                read[name].append(statistics(model))
    losses = torch.stack(dense).double().cpu()
    parts = torch.arange(given.steps).tensor_split(QUARTERS)
    rows = []
    for name, each in found.items():
        own, divergences = torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each])
        change, count = own - losses, len(ids)
        ratio = perplexity_ratio(losses.mean(1).tolist(), own.mean(1).tolist())
        rows.append(
            {
                **{"model": real.name, "text": text_name(given.text), "prompt": prompt, "steps": given.steps},
                **{"settings": given.settings, "decode": name, "ratio": ratio.ratio},
                **{"ratio_low": ratio.low, "ratio_high": ratio.high, "divergence": divergences.mean().item()},
                "prompt_far_density": sum(one[2] for one in each) / count,
                "far_density": sum(one.far_density for one in read[name]) / count,
                "total_density": sum(one.total_density for one in read[name]) / count,
                **{f"ratio_{n}": math.exp(change[:, part].mean()) for n, part in enumerate(parts, 1)},
                **{f"divergence_{n}": divergences[:, part].mean().item() for n, part in enumerate(parts, 1)},
                **{"windows": count, "seed": given.seed, "dtype": given.dtype},
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("model", help="checkpoint folder or GGUF file")
    add("--text", type=Path, required=True, metavar="FOLDER", help="every other document is for calibration")
    add("--prompt", nargs="+", default=["8k"], help="tokens of prompts, as 8192 or 8k")
    add("--steps", type=int, default=1024)
    add("--windows", type=int, default=8)
    add("--density", type=float, default=0.06, help="far density of prompts, for which θ is set")
    add("--decode-density", type=float, default=0.06, help="the same of decode steps")
    add("--adapter", type=Path, metavar="FOLDER", help="learned corrections")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of SurgeryConfig")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=DTYPE)
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS / "sparse_steps.csv")
    given = parser.parse_args()
    try:
        real = real_model(given.model, given.device, given.dtype, given.adapter, given.set)
        calibration, texts = split(given.text, None)
        given.settings = "defaults"
        if real.routers:
            given.settings = f"learned ({adapter_digest(SurgeryConfig(), real.routers)[:8]})"
        for length in given.prompt:
            prompt = parse_length(length)
            density = {"density": given.density, "decode_density": given.decode_density}
            about = {"text": calibration, "tokenizer": real.tokenizer, "length": prompt}
            with llama_surgery.operated(real.model, real.config, routers=real.routers, **density, **about):
                config, routers = config_of(real.model), routers_of(real.model)
            config = dataclasses.replace(config, dense_until=real.config.dense_until)
            made = real._replace(routers=routers)
            rows = rows_of(made, given, texts, prompt, by_decode(config))
            for row in rows:
                print(
                    f"{prompt} tokens, decode {row['decode']}: far density {row['far_density']:.3f}, ÷ dense "
                    f"{row['ratio']:.4f} ({row['ratio_low']:.4f} … {row['ratio_high']:.4f}), by quarters "
                    + ", ".join(f"{row[f'ratio_{n}']:.4f}" for n in range(1, QUARTERS + 1)),
                    flush=True,
                )
            merge(given.out, rows, COLUMNS, KEYS, lambda key: key)
    except SurgeryError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

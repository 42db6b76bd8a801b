"""Where the error of a layer's output comes from: the score that opens pages, or what stands in for the rest.

    python -m benchmarks.layers MODEL --text DIR

Every layer is given the dense model's own states at some rows of one window, each row opens the pages whose
estimated share exceeds one θ, and the squared error of the projected output against the dense layer is
reported relative to that of the default, which sees the opened pages and nothing else. Rules that know the
keys (full covariance, true weights) cost more than they save: they say what there is to gain. ``eigen`` is
the second-order score in the channels that diagonalise the mean covariance inside balls, found on another
text.
"""

import argparse
import functools
import math
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig
from llama_surgery.evaluation.io import write_csv
from llama_surgery.surgery.interface import dense_attention, surgery_mask
from llama_surgery.text import read_texts, windows
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.selection import Scorer

RESULTS = Path(__file__).parent / "results" / "layers.csv"
NAME = "surgery_layers"
SCORES = ("second order", "eigen", "full covariance", "true weights")
WEIGHTS = ("score", "bounded", "true weights")


def dense_states(model: torch.nn.Module, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
    """Queries (kv_heads, group, n, d), keys, values and output projection (kv_heads, group, d, hidden)."""
    found: dict[int, tuple[torch.Tensor, ...]] = {}

    def attention(module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest, **more):
        grouped = q[0].unflatten(0, (k.shape[1], -1))
        projection = module.o_proj.weight.detach().T.unflatten(0, (*grouped.shape[:2], v.shape[-1]))
        found[module.layer_idx] = (grouped.clone(), k[0].clone(), v[0].clone(), projection)
        return dense_attention("sdpa", module, q, k, v, *rest, **more)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, functools.partial(surgery_mask, "sdpa"))
    model.set_attn_implementation(NAME)
    model(ids[None], use_cache=False, logits_to_keep=1)
    return found


class Layer:
    """One layer at some rows, everything far in tree order, and estimates of what balls weigh."""

    def __init__(
        self, states: tuple[torch.Tensor, ...], rows: torch.Tensor, config: SurgeryConfig, basis: torch.Tensor
    ) -> None:
        queries, keys, values, self.projection = states
        self.config, scale = config, queries.shape[-1] ** -0.5
        far = (int(rows[0]) - config.window) // config.chunk_size * config.chunk_size
        layout = build_layout(keys[:, :far], values[:, :far], config)
        queries = queries[:, :, rows]
        near = queries @ keys[:, None, far:].transpose(-1, -2) * scale
        hidden = torch.arange(far, keys.shape[1]) > rows[:, None]
        self.near = near.masked_fill(hidden, -math.inf)
        self.far = queries @ layout.keys[:, None].transpose(-1, -2) * scale
        self.values = torch.cat((layout.values, values[:, far:]), 1)[:, None]
        self.layout_values = layout.values
        self.dense = torch.softmax(torch.cat((self.far, self.near), -1), -1) @ self.values
        size, flat = config.ball_size, queries.flatten(1, 2)
        balls = layout.keys.unflatten(1, (-1, size))
        inside = balls - balls.mean(2, keepdim=True)
        linear = queries @ balls.mean(2)[:, None].transpose(-1, -2) * scale + math.log(size)
        turned = (queries @ basis[:, None]).square() * scale**2
        eigen = turned @ (inside @ basis[:, None]).square().mean(2)[:, None].transpose(-1, -2)
        across = self.far.unflatten(-1, (-1, size))
        scorer, shape = Scorer(scale), queries.shape[1:3]
        self.balls = {
            "second order": scorer(flat, layout.moments).unflatten(1, shape),
            "bounded": scorer.weights(flat, layout.moments).unflatten(1, shape),
            "eigen": linear + eigen / 2,
            "full covariance": linear + across.var(-1, correction=0) / 2,
            "true weights": across.logsumexp(-1),
        }
        self.balls["score"] = self.balls["second order"]

    def shares(self, score: str) -> torch.Tensor:
        """(kv_heads, rows, pages) log shares, largest over the group."""
        pages = self.pages(self.balls[score])
        total = torch.logaddexp(pages.logsumexp(-1), self.near.logsumexp(-1))
        return (pages - total.unsqueeze(-1)).amax(1)

    def pages(self, balls: torch.Tensor) -> torch.Tensor:
        return balls.unflatten(-1, (-1, self.config.balls_per_page)).logsumexp(-1)

    def error(self, seen: torch.Tensor, summary: str = "none", weights: str = "score") -> float:
        """Mean squared error of the projected output, pages ``seen`` (kv_heads, rows, pages) opened."""
        seen = seen[:, None]
        hidden = ~seen.repeat_interleave(self.config.page_size, -1)
        logits, values = [self.far.masked_fill(hidden, -math.inf), self.near], [self.values]
        if summary != "none":
            terms, size = self.balls[weights], self.config.ball_size
            if summary == "ball":
                closed = seen.repeat_interleave(self.config.balls_per_page, -1)
            else:
                terms, closed, size = self.pages(terms), seen, self.config.page_size
            terms = terms.masked_fill(closed, -math.inf)
            logits.append(terms)
            values.append(self.layout_values.unflatten(1, (-1, size)).mean(2)[:, None])
        out = torch.softmax(torch.cat(logits, -1), -1) @ torch.cat(values, 2)
        return float(torch.einsum("ghrd,ghdo->ro", out - self.dense, self.projection).square().sum(-1).mean())


def basis_of(states: tuple[torch.Tensor, ...], config: SurgeryConfig) -> torch.Tensor:
    """(kv_heads, d, d) eigenvectors of the mean covariance of keys inside balls."""
    keys = states[1][:, : states[1].shape[1] // config.chunk_size * config.chunk_size]
    balls = build_layout(keys, keys, config).keys.unflatten(1, (-1, config.ball_size))
    inside = (balls - balls.mean(2, keepdim=True)).flatten(1, 2)
    return torch.linalg.eigh(inside.transpose(-1, -2) @ inside)[1]


@torch.inference_mode()
def main() -> None:
    options = _parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    config, rows = SurgeryConfig(), []
    other = read_texts(options.basis_text or options.text)
    states = dense_states(model, windows(tokenizer, other, options.length, 1, options.seed + 1)[0])
    bases = {index: basis_of(part, config) for index, part in states.items()}
    ids = windows(tokenizer, read_texts(options.text), options.length, options.windows, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for number, window in enumerate(ids):
        chosen = torch.randint(options.length // 2, options.length, (options.rows,), generator=generator)
        states = dense_states(model, window)
        layers = [Layer(part, chosen.sort().values, config, bases[i]) for i, part in states.items()]
        default: list[float] = []
        for score in SCORES:
            shares = torch.stack([layer.shares(score) for layer in layers])
            theta = shares.flatten().sort().values[int(shares.numel() * (1 - options.opened))]
            kinds = [("none", "score")]
            if score == SCORES[0]:
                kinds += [(summary, kind) for summary in ("page", "ball") for kind in WEIGHTS]
            for summary, kind in kinds:
                errors = [
                    layer.error(share > theta, summary, kind)
                    for layer, share in zip(layers, shares, strict=True)
                ]
                default = default or errors
                relative = [error / first for error, first in zip(errors, default, strict=True)]
                row = {"window": number, "score": score, "summary": summary, "weights": kind}
                row |= {"opened": options.opened, "length": options.length, "theta": float(theta.exp())}
                rows.append(
                    row
                    | {"mean": sum(relative) / len(relative)}
                    | {f"layer_{i}": value for i, value in zip(states, relative, strict=True)}
                )
        write_csv(options.out, rows)
    _table(rows)


def _table(rows: list[dict]) -> None:
    """Means over windows."""
    names = list(dict.fromkeys((row["score"], row["summary"], row["weights"]) for row in rows))
    layers = [key for key in rows[0] if key.startswith("layer_")]
    for name in names:
        own = [row for row in rows if (row["score"], row["summary"], row["weights"]) == name]
        mean = {key: sum(row[key] for row in own) / len(own) for key in ("mean", *layers)}
        told = " ".join(f"{mean[key]:5.2f}" for key in layers)
        print(f"{name[0]:16} {name[1]:6} {name[2]:13} mean {mean['mean']:.3f}  by layer {told}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--basis-text", type=Path, help="the same text, another window, if left out")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=64, help="rows compared, from the second half of a window"
    )
    parser.add_argument("--opened", type=float, default=0.06, help="share of the closed pages that rows open")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()

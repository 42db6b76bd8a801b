"""Forms of selection and of summaries on a real model, end to end, emulated with exact masks (`emulated.py`).

    python benchmarks/emulated_forms.py MODEL --calibration-text DIR --text DIR --device cuda

Every form has its threshold set to the same executed far density on the calibration text, then perplexity, KL
divergence to dense and needles are measured on the same windows and prompts as dense; decode steps and the
last tile of a prompt read everything. Rows are added to benchmarks/results/emulated_forms.csv as measured.
"""

import argparse
import csv
import dataclasses
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emulated import CHUNK, WINDOW, Counts, Form, attend
from torch.nn import functional as F

from llama_surgery.cli.common import Dtype, load_model
from llama_surgery.evaluation.logits import Head, final_states
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.perplexity import perplexity, token_divergence
from llama_surgery.files import write_csv
from llama_surgery.surgery.metric import metric_of
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules
from llama_surgery.text import read_texts, windows

RESULTS = Path(__file__).parent / "results" / "emulated_forms.csv"
#: Bins of log thresholds.
LOWEST, STEP, BINS = -40.0, 0.02, 3000

OWN = {"own": True, "tile": 64}
FORMS = (
    Form("gaussian, nothing stands in", "gaussian", summary=0),
    Form("gaussian, balls stand in", "gaussian", summary=8),
    Form("bounded, pages stand in"),
    Form("bounded, pages by bounded weights", weight="bounded"),
    Form("bounded, pages by true weights", weight="exact"),
    Form("bounded, pages by their balls", weight="balls"),
    Form("log cosh", "logcosh"),
    Form("mean alone", "mean"),
    Form("log cosh of balls of 4", "logcosh", ball=4),
    Form("log cosh of balls of 16", "logcosh", ball=16),
    Form("true shares", "exact"),
    Form("true shares and weights", "exact", weight="exact"),
    Form("true shares and weights, balls", "exact", weight="exact", summary=8),
    Form("heads alone, tile 16", own=True, tile=16, weight="balls"),
    Form("heads alone, tile 32", own=True),
    Form("heads alone, tile 64", **OWN),
    Form("heads alone, balls of 16", ball=16, weight="balls", **OWN),
    Form("heads alone, balls of 4", ball=4, weight="balls", **OWN),
    Form("heads alone, true shares", "exact", **OWN),
    Form("heads alone, tree of queries", tree="queries", **OWN),
    Form("heads alone, tree of values", tree="values", **OWN),
    Form("heads alone, tree of both", tree="both", **OWN),
    Form("heads alone, tile 32, tree of both", own=True, tree="both"),
    Form("heads alone, tree of both, true shares", "exact", tree="both", **OWN),
    Form("tree of both", tree="both"),
    Form("tree of both, true shares", "exact", tree="both"),
    *(
        Form(
            f"balls of {ball}, {score}"
            + (f", propose {propose}, true shares open {density}" if propose else f" open {density}"),
            score,
            ball=ball,
            page=page,
            summary=page,
            tree=tree,
            totals=totals,
            propose=propose,
            density=density,
            **OWN,
        )
        for score, ball, totals, tree, page, propose, density in (
            ("bounded", 8, 64, "both", 32, 0.1, 0.057),
            ("bounded", 8, 64, "keys", 32, 0.1, 0.057),
            ("logcosh", 8, 64, "keys", 32, 0.1, 0.057),
            ("logcosh", 16, 64, "keys", 32, 0.1, 0.057),
            ("bounded", 16, 64, "both", 32, 0.1, 0.057),
            ("gaussian", 16, 64, "both", 32, 0.1, 0.057),
            ("bounded", 16, 64, "queries", 32, 0.1, 0.057),
            ("bounded", 16, 64, "both", 64, 0.1, 0.057),
            ("bounded", 16, 64, "both", 32, 0.15, 0.057),
            ("bounded", 16, 64, "both", 32, 0.0, 0.057),
            ("bounded", 32, 64, "both", 32, 0.1, 0.057),
            ("bounded", 32, 64, "both", 32, 0.15, 0.057),
            ("logcosh", 32, 64, "both", 32, 0.15, 0.057),
            ("gaussian", 32, 32, "both", 32, 0.0, 0.06),
            ("bounded", 32, 32, "both", 32, 0.0, 0.06),
            ("bounded", 16, 32, "both", 32, 0.0, 0.06),
            ("gaussian", 32, 32, "both", 32, 0.0, 0.08),
            ("gaussian", 32, 32, "both", 32, 0.077, 0.043),
            ("gaussian", 32, 32, "both", 32, 0.09, 0.03),
        )
    ),
    *(
        Form(
            f"pages of {page}" + "".join(f", {name} {value}" for name, value in changes.items()),
            **{
                "score": "gaussian",
                "page": page,
                "ball": page,
                "summary": page,
                "totals": page,
                "tree": "both",
                "density": 0.06,
                **OWN,
                **changes,
            },
        )
        for page, changes in (
            (32, {}),
            (32, {"tree": "queries"}),
            (32, {"tree": "keys"}),
            (32, {"ball": 16}),
            (16, {}),
            (16, {"density": 0.05}),
            (32, {"score": "samples"}),
            (32, {"score": "samples", "totals_term": "samples"}),
            (32, {"score": "samples", "totals_term": "samples", "weight": "samples"}),
            (32, {"score": "logcosh"}),
            (32, {"opens": "error"}),
            (32, {"opens": "values"}),
            (32, {"score": "samples", "opens": "error"}),
            (32, {"falls": 0.5}),
            (32, {"falls": 1.0}),
            (32, {"score": "exact"}),
            (32, {"score": "exact", "opens": "error"}),
            (32, {"tile": 32}),
            (32, {"score": "samples", "tile": 32}),
            (32, {"score": "samples", "tile": 16}),
            (32, {"score": "samples", "tile": 1}),
            (32, {"score": "samples", "density": 0.12}),
            (16, {"score": "samples"}),
            (16, {"score": "samples", "tile": 16}),
        )
    ),
)


class Emulation:
    """Runs a dense model with a form's attention, or as it is while there is no form."""

    def __init__(self, metrics: dict[int, torch.Tensor]) -> None:
        self.metrics, self.form, self.thetas = metrics, None, (0.0, 0.0)
        self.counts, self.bins = Counts(), None

    def attention(
        self, base: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any
    ) -> Any:
        scale, rows = keywords["scaling"], query.shape[2]
        if self.form is None or rows == 1 or key.shape[2] <= CHUNK + WINDOW:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=rows > 1, enable_gqa=True, scale=scale
            )
            return out.transpose(1, 2).contiguous(), None
        metric = self.metrics[module.layer_idx]
        outs = [
            attend(
                self.form,
                q.float() * scale,
                k.float(),
                v.float(),
                metric,
                self.thetas,
                self.counts,
                self._hear,
            )
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.stack(outs).to(query.dtype).transpose(1, 2).contiguous(), None

    def _hear(self, compared: torch.Tensor, pairs: torch.Tensor) -> None:
        if self.bins is not None:
            index = ((compared - LOWEST) / STEP).ceil().long().clamp(0, BINS - 1)
            self.bins += torch.bincount(index.flatten(), pairs.flatten().double(), BINS)

    def calibrate(self, form: Form, run: Callable[[], None], device: torch.device) -> None:
        """Set the thresholds that give the form its densities over what ``run`` runs."""
        self.form, self.thetas = form, (-math.inf, -3.0)

        def find(density: float) -> float:
            self.counts, self.bins = Counts(), torch.zeros(BINS, dtype=torch.float64, device=device)
            run()
            above = self.bins.flip(0).cumsum(0).flip(0) - self.bins
            return LOWEST + STEP * int((above <= density * self.counts.causal).nonzero()[0])

        if form.propose:
            self.thetas = find(form.propose), -3.0
        self.thetas = self.thetas[0], find(form.density)
        self.counts, self.bins = Counts(), None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration-text", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--needles", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", action="append", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, options.device, Dtype.bfloat16)
    texts = read_texts(options.text)
    calibration = windows(tokenizer, read_texts(options.calibration_text), options.length, 3, seed=0)
    ids = windows(tokenizer, texts, options.length, options.windows, seed=options.seed)
    prompts = needle_prompts(
        tokenizer, texts, count=options.needles, lengths=[options.length], seed=options.seed
    )
    text = calibration[:2, : options.length // 2].to(model.device)  # instead of random tokens
    emulation = Emulation(metric_of(model, lambda _: model(text, use_cache=False, logits_to_keep=1)))
    head = Head(model, ids[0])
    dense_states: list[torch.Tensor] = []
    with attention_replaced(model, attention_modules(model).values(), emulation.attention), torch.no_grad():
        dense = perplexity(model, ids, head=head, each=lambda states: dense_states.append(states))
        answered = [p for p, right in zip(prompts, score_needles(model, prompts), strict=True) if right]
        for form in FORMS:
            if options.form and form.name not in options.form:
                continue
            emulation.calibrate(form, lambda: [final_states(model, w) for w in calibration], model.device)
            divergence: list[float] = []

            def compare(states: torch.Tensor) -> None:
                whole = token_divergence(head, dense_states[len(divergence)], states)[0]  # noqa: B023
                divergence.append(float(whole.mean()))  # noqa: B023

            measured = perplexity(model, ids, head=head, each=compare)
            counts = emulation.counts
            far, summary = float(counts.far) / counts.causal, counts.summary / 2 / counts.causal
            proposed = float(counts.proposed) / counts.causal
            looked = max(0.0, proposed - far) / 2 if form.propose else 0.0
            kept = sum(score_needles(model, answered))
            thetas, emulation.form = emulation.thetas, None
            changes = (measured.nll - dense.nll).mean(1)
            row = {
                "model": Path(options.model).stem, "length": options.length, "form": form.name,
                **{name: value for name, value in dataclasses.asdict(form).items() if name != "name"},
                "far_density": round(far, 4), "summary_density": round(summary, 4),
                "proposed_density": round(proposed, 4),
                # A proposed page that is not opened costs a product with its keys: half of an opened one.
                "total_density": round(far + looked + summary + counts.near / counts.causal, 4),
                "ratio": round(math.exp(changes.mean()), 4),
                "ratio_se": round(float(changes.std() / len(changes) ** 0.5), 4),
                "kl": round(sum(divergence) / len(divergence), 5),
                "theta": round(math.exp(thetas[1]), 5),
                "theta_propose": round(math.exp(thetas[0]), 5) if form.propose else None,
                "needles_asked": len(prompts), "needles_dense": len(answered), "needles_kept": kept,
                "windows": len(ids), "seed": options.seed,
                "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
                "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            print(row, flush=True)
            _add(options.out, row)


def _add(path: Path, row: dict[str, Any]) -> None:
    before: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            before = list(csv.DictReader(file))
    write_csv(path, [*before, row])


if __name__ == "__main__":
    main()

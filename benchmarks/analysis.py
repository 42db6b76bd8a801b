"""What trees look like: by lag and domain, documents told apart, needles in their haystack, budgets of heads.

    python -m benchmarks.analysis MODEL --domains books=DIR python=DIR … [--adapter DIR]

Trees are those of the operated model's own keys, over whole chunks. Tables go to ``--out`` as CSV, figures
as SVG.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery import SurgeryConfig, config_of, load_adapter, operate
from llama_surgery.evaluation.needle import needle_prompts
from llama_surgery.files import write_atomically, write_csv
from llama_surgery.report.style import AMOUNT, OPERATED, figure, to_svg
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import paged_cache, routers_of
from llama_surgery.text import read_texts, windows
from llama_surgery.topology.tree import distances, paths

#: Distances in the text at which distances in the tree are reported.
LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Tokens before the answer that count as the planted fact, with the answer itself.
LEAD = 8


@torch.inference_mode()
def tree_distances(model: torch.nn.Module, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Tree distances of the keys of every chunk of one text.

    Args:
        ids: (length,) int64.

    Returns:
        By layer, (kv_heads, chunks, chunk_size, chunk_size) float32, as shares of the tree's depth.
    """
    config, cache = config_of(model), paged_cache(model)
    model(ids[None].to(model.device), use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    found = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            layout = layer.stores[0].layout
            assert layout is not None  # texts have whole chunks
            digits = paths(layout.order.long().cpu(), config.page_size)
            found[index] = distances(digits).float() / digits.shape[-1]
    return found


def by_lag(apart: torch.Tensor) -> list[float]:
    """Mean tree distance at each of LAGS inside the chunk, of (..., keys, keys) distances."""
    return [float(apart.diagonal(lag, -2, -1).mean()) for lag in LAGS if lag < apart.shape[-1]]


def domains(model: torch.nn.Module, tokenizer: object, options: argparse.Namespace) -> None:
    """Distances by lag, a mean matrix a domain, and fingerprints of documents."""
    lags, matrices, prints, labels = [], {}, [], []
    for name, folder in options.domains.items():
        total, count = 0, 0
        for number, text in enumerate(read_texts(folder)[: options.documents]):
            ids = windows(tokenizer, [text], options.length, 1, options.seed)[0]
            found = tree_distances(model, ids)
            whole = torch.stack(list(found.values()))  # (layers, kv_heads, chunks, keys, keys)
            total, count = total + whole.mean((0, 1, 2)), count + 1
            prints.append([by_lag(head) for layer in found.values() for head in layer])
            labels.append(name)
            for layer, apart in found.items():
                row = {"domain": name, "document": number, "layer": layer}
                lags.append(row | dict(zip((f"lag_{lag}" for lag in LAGS), by_lag(apart), strict=False)))
            write_csv(options.out / "tree-distances.csv", lags)
        matrices[name] = (total / count).numpy()
        near, far = (matrices[name].diagonal(lag).mean() for lag in (1, 64))
        print(f"{name}: distance ÷ depth {near:.3f} of neighbours, {far:.3f} 64 tokens apart, {count} texts")
    points, accuracy = fingerprints(np.array(prints).reshape(len(prints), -1), labels)
    rows = [{"domain": n, "x": p[0], "y": p[1]} for n, p in zip(labels, points, strict=True)]
    write_csv(options.out / "fingerprints.csv", rows)
    chance = max(labels.count(name) for name in matrices) / len(labels)
    print(
        f"documents given to the right domain by the nearest other mean: {accuracy:.3f} (chance {chance:.3f})"
    )
    _save(options.out / "distance-matrices.svg", _matrices(matrices))
    _save(options.out / "fingerprints.svg", _scatter(points, labels, accuracy))


def fingerprints(vectors: np.ndarray, labels: list[str]) -> tuple[np.ndarray, float]:
    """Documents in the plane of their two principal components, and how well domains are told apart.

    Args:
        vectors: (documents, features).
        labels: Domain of each.

    Returns:
        (documents, 2), and the share of documents whose nearest domain mean, the document itself left out,
        is their own.
    """
    scaled = (vectors - vectors.mean(0)) / vectors.std(0).clip(1e-9)
    names, own = sorted(set(labels)), np.array(labels)
    right = 0
    for i, vector in enumerate(scaled):
        others = np.arange(len(scaled)) != i
        means = {n: scaled[others & (own == n)].mean(0) for n in names if (others & (own == n)).any()}
        right += min(means, key=lambda n: float(np.square(vector - means[n]).sum())) == labels[i]
    _, _, axes = np.linalg.svd(scaled, full_matrices=False)
    return scaled @ axes[:2].T, right / len(scaled)


def needles(model: torch.nn.Module, tokenizer: object, options: argparse.Namespace) -> None:
    """Is a planted fact farther from its chunk than other stretches of the same length are?"""
    texts = read_texts(next(iter(options.domains.values())))
    prompts = needle_prompts(
        tokenizer, texts, count=options.needles, lengths=[options.length], seed=options.seed
    )
    size, rows = config_of(model).chunk_size, []
    for prompt in prompts:
        ids = torch.tensor(prompt.input_ids)
        span = _span(prompt.input_ids, prompt.answer_ids)
        if span is None or span[0] // size != (span[1] - 1) // size or span[1] > len(ids) // size * size:
            continue  # the fact lies across a border of chunks, or in the last part
        chunk, first, width = span[0] // size, span[0] % size, span[1] - span[0]
        for layer, apart in tree_distances(model, ids).items():
            for head, matrix in enumerate(apart[:, chunk]):
                outward = matrix.mean(1)  # of every key to its whole chunk
                spans = outward.unfold(0, width, 1).mean(1)
                within = matrix.unfold(0, width, 1).unfold(1, width, 1).diagonal(0, 0, 1).mean((0, 1))
                apart_from = (spans * size - within * width) / (size - width)
                rows.append(
                    {
                        "layer": layer,
                        "kv_head": head,
                        "needle": float(apart_from[first]),
                        "haystack": float(apart_from.mean()),
                        "rank": float((apart_from < apart_from[first]).float().mean()),
                    }
                )
        write_csv(options.out / "needle-distances.csv", rows)
    if rows:
        mean = {name: np.mean([row[name] for row in rows]) for name in ("needle", "haystack", "rank")}
        print(
            f"needles: distance to the chunk {mean['needle']:.3f}, of stretches as long "
            f"{mean['haystack']:.3f}; mean rank {mean['rank']:.3f} (0.5: like any other, 1: farthest), "
            f"{len(rows)} heads × prompts"
        )


def _span(ids: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, int] | None:
    """Where the planted fact stands: the answer's first occurrence and LEAD tokens before it."""
    for start in range(LEAD, len(ids) - len(answer)):
        if ids[start : start + len(answer)] == answer:
            return start - LEAD, start + len(answer)
    return None


def budgets(model: torch.nn.Module, options: argparse.Namespace) -> None:
    """Learned log-θ offsets of every layer and head."""
    routers = {i: r for i, r in routers_of(model).items() if r.offset is not None}
    rows = [
        {"layer": i, "kv_head": g, "head": h, "offset": float(value)}
        for i, router in routers.items()
        for g, heads in enumerate(router.offset)
        for h, value in enumerate(heads)
    ]
    write_csv(options.out / "budgets.csv", rows)
    table = np.array([router.offset.cpu().flatten().numpy() for router in routers.values()])
    most = float(np.abs(table).max()) or 1.0
    with figure(5.1, 1.3 + 0.34 * len(table)) as fig:
        panel = fig.subplots()
        image = panel.imshow(table, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
        panel.grid(visible=False)
        panel.set_yticks(range(len(table)), [str(i) for i in routers])
        panel.set_xlabel("query head")
        panel.set_ylabel("layer")
        panel.set_title("Learned log-θ offset: positive opens less")
        fig.colorbar(image, ax=panel, pad=0.02).outline.set_visible(False)
        svg = to_svg(fig, "Learned threshold offset of every layer and query head")
    _save(options.out / "budgets.svg", svg)
    print(f"budgets: offsets from {table.min():.2f} to {table.max():.2f}")


def _matrices(matrices: dict[str, np.ndarray]) -> str:
    with figure(2.6 * len(matrices) + 0.6, 2.9) as fig:
        panels = fig.subplots(1, len(matrices), squeeze=False)[0]
        least = min(float(matrix[matrix > 0].min()) for matrix in matrices.values())
        for panel, (name, matrix) in zip(panels, matrices.items(), strict=True):
            image = panel.imshow(matrix, cmap=AMOUNT, vmin=least, vmax=1)
            panel.grid(visible=False)
            panel.set_title(name)
            panel.set_xlabel("token of the chunk")
        fig.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="tree distance ÷ depth")
        return to_svg(fig, "Mean tree distance of every two tokens of a chunk: " + ", ".join(matrices))


def _scatter(points: np.ndarray, labels: list[str], accuracy: float) -> str:
    with figure(5.6, 4.2) as fig:
        panel = fig.subplots()
        for name, colour in zip(dict.fromkeys(labels), OPERATED, strict=False):
            own = points[np.array(labels) == name]
            panel.scatter(own[:, 0], own[:, 1], color=colour, s=28, label=name)
        panel.set_title(f"Documents by their trees: {accuracy:.0%} nearest to their own domain")
        panel.set_xlabel("first principal component")
        panel.set_ylabel("second")
        panel.legend()
        return to_svg(fig, "Documents by tree distances of all heads, coloured by domain")


def _save(path: Path, svg: str) -> None:
    write_atomically(path, lambda file: file.write_text(svg, encoding="utf-8"))


def _domain(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--domains", nargs="+", required=True, type=_domain, metavar="NAME=DIR")
    parser.add_argument("--adapter", type=Path, help="learned corrections; the default topology if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=10, help="of each domain, at most")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/analysis"))
    options = parser.parse_args()
    options.domains = dict(options.domains)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    if options.adapter is None:
        operate(model, SurgeryConfig(backend="gather"))
    else:
        load_adapter(model, options.adapter)
        budgets(model, options)
    domains(model, tokenizer, options)
    needles(model, tokenizer, options)


if __name__ == "__main__":
    main()

"""Whatever can be configured is executed alike by every backend, or refused before anything runs."""

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from tests.surgery.tiny import build, in_pieces, tokens

from llama_surgery import SurgeryConfig, SurgeryError, config_of, operate, operated, statistics
from llama_surgery.surgery.operation import set_config

#: Where the kernels run: a GPU, or a CPU under Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = SurgeryConfig(chunk_size=16, page_size=4, window=8, tile=4, theta=0.1)

#: Sizes that nothing but a multiple holds together, each with a rule: (page, pages of a chunk, tile,
#: window in tiles, head_dim), and (θ, θ of decode steps, summary, dense_until in tiles).
SIZES = ((1, 4, 1, 0, 16), (3, 4, 3, 1, 16), (5, 1, 5, 2, 20), (8, 4, 16, 1, 24), (24, 2, 12, 0, 16))
RULES = ((0.0, None, "page", 0), (0.1, None, "none", 1), (0.1, 0.1, "page", 0), (2.0, 0.1, "none", 0))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("sizes", "rule"), list(zip(SIZES, itertools.cycle(RULES), strict=False)))
def test_backends_agree(sizes: tuple[int, ...], rule: tuple[Any, ...]) -> None:
    """A prompt, a piece of several tokens, single tokens."""
    (page, pages, tile, window, head_dim), (theta, decode, summary, dense) = sizes, rule
    config = SurgeryConfig(
        chunk_size=page * pages,
        page_size=page,
        tile=tile,
        window=window * tile,
        theta=theta,
        theta_decode=None if tile == 1 else decode,
        theta_length=tile * 3 if summary == "page" else 0,
        summary=summary,
        dense_until=dense * tile,
    )
    model = build("Llama", dtype=torch.float32, head_dim=head_dim, num_hidden_layers=1).to(DEVICE)
    length = config.window + 2 * config.chunk_size + tile + 9
    ids, found = tokens(1, length).to(DEVICE), {}
    for backend in ("reference", "gather", "triton"):
        with operated(model, dataclasses.replace(config, backend=backend)):
            out, _ = in_pieces(model, ids, [length - 7, length - 2, length - 1])
            found[backend] = out, statistics(model)
    for backend in ("reference", "triton"):
        torch.testing.assert_close(found[backend][0], found["gather"][0], rtol=0, atol=1e-3)
        for name in ("near_density", "far_density", "visible_far_density", "summary_density", "pages_read"):
            assert getattr(found[backend][1], name) == getattr(found["gather"][1], name)


@pytest.mark.parametrize(
    ("changes", "head_dim", "told"),
    [
        ({"tile": 256, "chunk_size": 256, "page_size": 64, "window": 256}, 16, "tile=256"),
        ({"page_size": 256, "chunk_size": 512}, 16, "page_size=256"),
        ({"chunk_size": 16384, "page_size": 64}, 16, "chunk_size=16384"),
        ({"chunk_size": 8192, "page_size": 64}, 160, "chunk_size=8192"),
        ({}, 288, "head_dim=288"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_where_they_are_named(
    changes: dict[str, Any], head_dim: int, told: str
) -> None:
    config = dataclasses.replace(SMALL, **changes)
    named = dataclasses.replace(config, backend="triton")
    model = build("Llama", dtype=torch.float32, head_dim=head_dim, num_hidden_layers=1).to(DEVICE)
    with pytest.raises(SurgeryError, match=f"backend='triton' cannot run this: .*{told}"):
        operate(model, named)
    answers = []
    for backend in ("reference", "gather", "auto"):
        with operated(model, dataclasses.replace(config, backend=backend)), torch.no_grad():
            answers.append(model(tokens(1, 40).to(DEVICE)).logits)
            with pytest.raises(SurgeryError, match=told):
                set_config(model, named)
            assert config_of(model).backend == backend
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-3)

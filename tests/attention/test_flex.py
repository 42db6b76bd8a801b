"""FlexAttention executes the same plans as the reference."""

import dataclasses

import pytest
import torch

from llama_surgery.attention.api import attend
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import build_layout

CONFIG = SurgeryConfig(
    chunk_size=32, page_size=8, window=16, tile=8, theta=0.08, theta_decode=0.05, backend="reference"
)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("start", "stop", "tile"), [(0, 200, 8), (65, 130, 8), (129, 130, 1), (0, 1, 8)])
def test_flex_equals_reference(start, stop, tile, softcap):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, stop - start, 16, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(2, stop, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    full = stop // 32 * 32
    layout = build_layout(keys[:, :full], values[:, :full], CONFIG) if full else None

    def run(backend):
        config = dataclasses.replace(CONFIG, backend=backend)
        return attend(queries, keys, values, layout, config=config, start=start, tile=tile, softcap=softcap)

    expected, got = run("reference"), run("flex")
    torch.testing.assert_close(got.out, expected.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-6, atol=1e-6)

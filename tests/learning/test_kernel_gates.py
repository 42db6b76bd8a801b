"""Gates by kernels against gates in plain PyTorch, outputs, readings and gradients."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.attention.impl.triton.gated import launch
from llama_surgery.config import SurgeryConfig
from llama_surgery.learning import kernel_gates
from llama_surgery.learning.attach import Gates, gated_layer
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.gates import Homotopy
from llama_surgery.learning.reading import Reading
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.1, backend="triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer(config: SurgeryConfig, homotopy: Homotopy, *, dtype=torch.float32, dim=24, group=2, rows=192):
    """Output, densities and gradients of one layer of a sequence with two KV heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parts = ("channels",) if config.summary == "none" else ("channels", "summary")
    learned = Corrections.build({0: (2, group, dim)}, parts, 0)
    for parameter in learned.parameters():
        parameter.data += 0.2 * normal(*parameter.shape)
    states = [
        x.to(DEVICE, dtype).requires_grad_()
        for x in (2 * normal(1, 2 * group, rows, dim), normal(1, 2, rows, dim), normal(1, 2, rows, dim))
    ]
    learned.to(DEVICE)
    gates = Gates(learned, config, math.log(config.theta), homotopy, mode="gated")
    out = gated_layer(*states, learned["0"].router(), gates, dim**-0.5)
    loss = (out.float() * normal(*out.shape).to(DEVICE)).sum() + 20 * gates.reading.soft_density()
    loss.backward()
    reading: Reading = gates.reading
    found = [
        reading.density(),
        float(reading.soft_density().detach()),
        reading.density_slope(),
        reading.mass_lost(),
    ]
    parameters = {name: p.grad.cpu() for name, p in learned.named_parameters()}
    named = dict(zip("qkv", (x.grad.float().cpu() for x in states), strict=True))
    return out.detach().float().cpu(), found, {**parameters, **named}


def assert_plain(config: SurgeryConfig, homotopy: Homotopy, **kind: int) -> None:
    out, read, gradients = layer(config, homotopy, **kind)
    plain_out, plain_read, plain = layer(dataclasses.replace(config, backend="gather"), homotopy, **kind)
    torch.testing.assert_close(out, plain_out, rtol=0, atol=2e-5)
    assert read == pytest.approx(plain_read, rel=1e-4, abs=1e-7)
    for name, gradient in gradients.items():
        size = float(plain[name].abs().max())
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-4 * size + 1e-6, msg=name)


@pytest.mark.parametrize(
    ("summary", "homotopy"),
    [("page", Homotopy(0.0, 0.5)), ("page", Homotopy(1.0, 0.1)), ("none", Homotopy(1.0, 0.5))],
)
def test_kernels_are_plain_gates(homotopy: Homotopy, summary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_gates, "GATES", 1 << 11)  # several blocks of rows
    assert_plain(dataclasses.replace(CONFIG, summary=summary), homotopy)


def test_other_shapes() -> None:
    config = dataclasses.replace(CONFIG, page_size=32, tile=32, dense_until=128)
    assert_plain(config, Homotopy(1.0, 0.3), dim=16, group=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
def test_half_precision(dim: int) -> None:
    config = dataclasses.replace(CONFIG, chunk_size=512, page_size=32, window=192, tile=64, theta=0.03)
    kind = {"dtype": torch.bfloat16, "dim": dim, "rows": 2048}
    out, read, gradients = layer(config, Homotopy(1.0, 0.3), **kind)
    plain_out, plain_read, plain = layer(
        dataclasses.replace(config, backend="gather"), Homotopy(1.0, 0.3), **kind
    )
    torch.testing.assert_close(out, plain_out, rtol=0, atol=3e-2)
    assert read == pytest.approx(plain_read, rel=2e-2)
    for name, gradient in gradients.items():
        error = (gradient - plain[name]).norm() / plain[name].norm()
        assert error < 2e-2, (name, float(error))


def test_what_kernels_do_not_know_is_plain() -> None:
    keys = torch.zeros(2, 128, 16, device=DEVICE)
    assert kernel_gates.serves(keys, keys, PageRouter(), CONFIG)
    learned_tree = PageRouter(key_map=torch.zeros(2, 16, 16))
    assert not kernel_gates.serves(keys, keys, learned_tree, CONFIG)
    assert not kernel_gates.serves(keys, keys, PageRouter(), dataclasses.replace(CONFIG, tile=1))
    assert "page_size=8" in str(launch.obstacle(dataclasses.replace(CONFIG, page_size=8)))

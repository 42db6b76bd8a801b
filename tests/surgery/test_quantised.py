"""Weights that are kept quantised: packed in bytes as GGUF's are, or in 8 bits as bitsandbytes keeps them.

Neither library runs everywhere, so that modules of their shape stand in for theirs.
"""

import pytest
import torch
from tests.surgery.tiny import DENSE_LIMIT, SPARSE, build, logits, tokens
from torch import nn
from transformers import PreTrainedModel

from llama_surgery import eject, load_adapter, operate, operated, save_adapter, statistics
from llama_surgery.topology.router import PageRouter


class Packed(nn.Module):
    """Two weights of four bits a byte, (out, in / 2) uint8, and one scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = float(weight.abs().max()) / 7
        codes = (weight / self.scale).round().clamp(-7, 7).to(torch.int8) + 8
        packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack((self.weight % 16, self.weight // 16), -1).flatten(1)
        return x @ ((codes.to(x.dtype) - 8) * self.scale).T


class EightBits(nn.Module):
    """(out, in) int8 weights, and their scales in another place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scales = linear.weight.abs().amax(1, keepdim=True).detach() / 127
        self.weight = nn.Parameter((linear.weight / self.scales).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scales).to(x.dtype).T


@pytest.fixture(params=[Packed, EightBits])
def model(request) -> PreTrainedModel:
    model = build("Llama", dtype=torch.float32)
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            model.model.set_submodule(name, request.param(module))
    return model


def test_quantised_models_are_operated_and_ejected(model, tmp_path):
    ids = tokens(1, 200)
    dense, state = logits(model, ids), {name: p.clone() for name, p in model.named_parameters()}
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    with operated(model, DENSE_LIMIT):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-3, atol=1e-3)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
    operate(model, SPARSE, routers={0: PageRouter(offset=torch.ones(2, 2))})
    sparse = logits(model, ids)
    assert statistics(model).far_density > 0
    save_adapter(model, tmp_path)
    eject(model)
    assert torch.equal(logits(model, ids), dense)
    assert torch.equal(logits(load_adapter(model, tmp_path), ids), sparse)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())

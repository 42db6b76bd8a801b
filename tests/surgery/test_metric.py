"""The metric in which keys are sorted: that of the layer's queries, measured when a model is operated."""

import copy
import logging

import pytest
import torch
from tests.surgery.tiny import build, logits, tokens

from llama_surgery import SurgeryConfig, eject, operate, operated
from llama_surgery.surgery.adapter import load_adapter, save_adapter
from llama_surgery.surgery.metric import TOKENS
from llama_surgery.surgery.operation import routers_of, statistics

CONFIG = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.3)


def test_channels_count_by_the_root_mean_square_of_their_queries() -> None:
    model = build("Llama")
    heard = []
    projection = model.model.layers[1].self_attn.q_proj
    handle = projection.register_forward_hook(lambda _, __, out: heard.append(out))
    operate(model, CONFIG)
    handle.remove()
    weight = routers_of(model)[1].key_weight
    kv_heads, dim = weight.shape
    # Rotary embedding leaves the square of a pair of channels as it is.
    squares = heard[0].detach().view(TOKENS, kv_heads, -1, 2, dim // 2).square().mean((0, 2, 3))
    expected = (squares / squares.mean(-1, keepdim=True)).sqrt().repeat(1, 2)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-4, atol=1e-4)


def test_it_is_the_same_for_every_topology_and_leaves_no_trace() -> None:
    model = build("Llama")
    dense, state = logits(model, tokens(1, 100)), torch.random.get_rng_state()
    operate(model, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert statistics(model).causal_pairs == 0
    first = {index: router.key_weight for index, router in routers_of(model).items()}
    eject(model)
    assert torch.equal(logits(model, tokens(1, 100)), dense)
    with operated(model, SurgeryConfig(chunk_size=64, page_size=16, window=64, tile=16, theta=0.01)):
        assert all(torch.equal(routers_of(model)[index].key_weight, first[index]) for index in first)
    with operated(model, CONFIG, routers={}):
        assert routers_of(model) == {}


def test_an_adapter_keeps_it(tmp_path) -> None:
    model = operate(build("Llama"), CONFIG)
    kept = {index: router.key_weight.clone() for index, router in routers_of(model).items()}
    save_adapter(model, tmp_path / "adapter")
    other = load_adapter(eject(model), tmp_path / "adapter")
    assert all(torch.equal(routers_of(other)[index].key_weight, kept[index]) for index in kept)


def test_a_model_that_cannot_run_here_is_operated_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = build("Llama")
    twin = copy.deepcopy(model).to("meta")
    assert routers_of(operate(twin, CONFIG)) == {}
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        operate(model, CONFIG)
    handle.remove()
    assert routers_of(model) == {} and "could not be run" in caplog.text
    assert logits(model, tokens(1, 100)).isfinite().all()

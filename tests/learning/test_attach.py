"""Attention that learning and peers replace for a while: other models, and dense passes, see no future."""

import math

import pytest
import torch
from tests.learning.test_gates import corrections
from tests.surgery.tiny import SPARSE, build, logits, tokens

from llama_surgery import operate, operated
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.peers.executor import running
from llama_surgery.evaluation.peers.rows import SinkWindow
from llama_surgery.learning.attach import Gates, gates_in


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_the_dense_pass_of_learning_is_the_dense_model(base: str) -> None:
    model, ids = build("Llama"), tokens(1, 200)
    model.set_attn_implementation(base)
    dense = logits(model, ids, use_cache=False)
    gates = Gates(corrections(1), SPARSE, math.log(SPARSE.theta))
    with gates_in(model, gates):
        assert torch.equal(logits(model, ids, use_cache=False), dense)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_another_model_on_the_same_configuration_stays_dense_meanwhile(base: str) -> None:
    model, ids = build("Llama"), tokens(1, 200)
    model.set_attn_implementation(base)
    other = type(model)(model.config).to(torch.float64).eval()
    dense, own = logits(other, ids), logits(model, ids)
    with running(model, SinkWindow(16, 16)):
        assert torch.equal(logits(other, ids), dense)
        assert not torch.equal(logits(model, ids), own)
        with pytest.raises(SurgeryError, match="operated already"):
            operate(model, SPARSE)
        with operated(other, SPARSE):
            assert not torch.equal(logits(other, ids), dense)
    assert torch.equal(logits(model, ids), own)

"""What may be operated: self-attention, told apart from other attention, and what its code gives away."""

import pytest
import torch
from tests.surgery import families
from tests.surgery.families import Exact
from tests.surgery.tiny import CACHE_NAME, DENSE_LIMIT, SPARSE, build, logits, tokens
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from llama_surgery import UnsupportedModelError, operate, operated, statistics
from llama_surgery.surgery import supported
from llama_surgery.surgery.source import AttentionSource, attention_source


def test_cross_attention_in_layers_of_its_own_stays_dense():
    with Exact(), torch.no_grad():
        model = families.build("mllama")
        for name, weight in model.named_parameters():
            if name.endswith("_gate"):
                weight.fill_(0.7)  # as they are made, images change nothing
        ids, states = tokens(1, 150), torch.randn(1, 7, 64, dtype=torch.float64)

        def answers() -> list[torch.Tensor]:
            whole = model(ids, cross_attention_states=states, use_cache=False).logits
            out = model(ids[:, :140], cross_attention_states=states, use_cache=True)
            parts = [out.logits]
            for column in range(140, 150):
                step = ids[:, column : column + 1]
                out = model(step, use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
                parts.append(out.logits)
            return [whole, torch.cat(parts, 1), model(ids, use_cache=True).logits]

        dense = answers()
        assert (dense[0] - dense[2]).norm() > 0.1 * dense[0].norm()
        with operated(model, DENSE_LIMIT):
            limit = answers()
            assert list(statistics(model).by_layer) == [0, 2]
        for got, expected in zip(limit, dense, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", [None, 2])
def test_attention_outside_of_the_decoders_layers_stays_dense(index):
    """A resampler of images, say, has the decoder's configuration and no place in its cache."""
    model = build("Qwen2")
    model.resampler = Qwen2Attention(model.config, layer_idx=0)
    model.resampler.layer_idx = index
    with operated(model, SPARSE):
        logits(model, tokens(1, 20))
        assert list(statistics(model).by_layer) == [0, 1]


def test_keys_of_something_else_are_refused_when_they_come():
    """Where the source does not tell, the call does: it brings more keys than tokens."""
    model = build("Llama")
    ids = tokens(1, 20)

    def forward(module, query, key, value, mask, **keywords):
        return attention(module, query, key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1), mask, **keywords)

    with operated(model, SPARSE):
        name = model.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS[name]
        ALL_ATTENTION_FUNCTIONS[name] = forward
        try:
            with pytest.raises(UnsupportedModelError, match="20 new tokens attend to 40 new keys"):
                logits(model, ids)
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]


def test_a_call_that_asks_for_bidirectional_attention_is_refused():
    model = build("Llama")
    with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match="is_causal=False"):
        logits(model, tokens(1, 20), is_causal=False)


def test_a_configuration_that_asks_for_bidirectional_attention_is_refused():
    model = build("Llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="bidirectional attention"):
        operate(model, SPARSE)


def test_an_attention_function_that_is_called_twice_is_refused_when_it_runs_too(monkeypatch):
    monkeypatch.setattr(supported, "attention_source", lambda kind: None)  # as if it could not be read
    model = build("DiffLlama")
    with (
        operated(model, SPARSE),
        pytest.raises(UnsupportedModelError, match="calls its attention function twice"),
    ):
        logits(model, tokens(1, 20))


class Module(nn.Module):
    config: object
    layer_idx = 0


class EitherBranch(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        if query.is_cuda:
            out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, query, query, attention_mask, **kwargs)
        else:
            out, _ = eager_attention_forward(self, query, query, query, attention_mask, **kwargs)
        return out


class InAHelper(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        return self.attend(query, attention_mask, **kwargs)

    def attend(self, query, attention_mask, **kwargs):
        attention = eager_attention_forward
        if query.is_cuda:
            attention = ALL_ATTENTION_FUNCTIONS[self.config]
        return attention(self, query, query, query, attention_mask=attention_mask, **kwargs)


class InALoop(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config, eager_attention_forward)
        return [attention(self, part, part, part, attention_mask, **kwargs) for part in query]


class OwnMask(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        mask = attention_mask
        mask = mask & (query > 0)
        return eager_attention_forward(self, query, query, query, mask, **kwargs)


class RenamedMask(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        mask = attention_mask
        if query.is_cuda:
            mask = mask & (query > 0)
        return eager_attention_forward(self, query, query, query, mask, **kwargs)


class OwnIndex(Module):
    def forward(self, query, cache, offset, attention_mask=None, **kwargs):
        key, value = cache.update(query, query, self.layer_idx + offset)
        return eager_attention_forward(self, query, key, value, attention_mask, **kwargs)


class Elsewhere(Module):
    def forward(self, query, attention_mask=None, **kwargs):
        functions = dict(ALL_ATTENTION_FUNCTIONS)
        return functions["sdpa"](self, query, query, query, attention_mask, **kwargs)


READ = {
    LlamaAttention: AttentionSource(1),
    GPT2Attention: AttentionSource(1),
    DiffLlamaAttention: AttentionSource(2),
    MambaMixer: AttentionSource(0),
    EitherBranch: AttentionSource(1),
    InAHelper: AttentionSource(1),
    InALoop: AttentionSource(2),
    OwnMask: AttentionSource(1, own_mask=True),
    RenamedMask: AttentionSource(1),
    OwnIndex: AttentionSource(1, own_index=True),
    Elsewhere: None,
}


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_what_an_attention_modules_code_gives_away(kind):
    assert attention_source(kind) == READ[kind]

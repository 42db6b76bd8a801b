"""Operating and ejecting: nothing is left behind; wrappers; what is refused when it runs."""

import copy
import pickle

import accelerate
import peft
import pytest
import torch
from tests.surgery.tiny import DENSE_LIMIT, SINGLE, SPARSE, build, in_pieces, logits, tokens
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llama_surgery
from llama_surgery import (
    PagedCache,
    SurgeryConfig,
    SurgeryError,
    UnsupportedModelError,
    config_of,
    eject,
    is_operated,
    operate,
    operated,
    reset_statistics,
    statistics,
)
from llama_surgery.surgery.compat import CACHE_NAME


@pytest.fixture
def model() -> PreTrainedModel:
    return build("Llama")


def trace(model):
    """All that surgery could leave on a model or in transformers."""
    return {
        "attributes": {name: set(module.__dict__) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "implementations": [
            module.config._attn_implementation
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
        ],
        "config": copy.deepcopy(model.config.to_dict()),
        "config attributes": set(model.config.__dict__),
        "generation": model.generation_config.to_dict(),
        "tables": (
            dict(AttentionInterface._global_mapping),
            dict(AttentionMaskInterface._global_mapping),
            sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
            sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        ),
    }


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same_weights(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype and torch.equal(after[name], weight)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eject_leaves_the_model_bit_identical(attention, dtype):
    model, ids = build("Llama", dtype=dtype), tokens(2, 150)
    model.set_attn_implementation(attention)
    before, state, outputs = trace(model), weights(model), logits(model, ids)
    assert operate(model, SPARSE) is model
    assert is_operated(model) and config_of(model) == SPARSE
    assert not torch.equal(logits(model, ids), outputs)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert_same_weights(model, state)
    assert eject(model) is model
    assert not is_operated(model)
    assert trace(model) == before
    assert_same_weights(model, state)
    assert torch.equal(logits(model, ids), outputs)


def test_operating_again_and_again_leaves_nothing(model):
    before = trace(model)
    for config in (SPARSE, SINGLE, DENSE_LIMIT):
        operate(model, config)
        logits(model, tokens(1, 100))
        eject(model)
    assert trace(model) == before


def test_the_context_manager_ejects_after_an_exception(model):
    before, outputs = trace(model), logits(model, tokens(1, 100))
    with pytest.raises(ZeroDivisionError), operated(model, SPARSE):
        logits(model, tokens(1, 100))
        raise ZeroDivisionError
    assert trace(model) == before
    assert torch.equal(logits(model, tokens(1, 100)), outputs)


def test_the_context_manager_bears_with_an_ejection_inside(model):
    before = trace(model)
    with operated(model, SPARSE):
        eject(model)
    assert trace(model) == before


def test_a_call_that_fails_half_way_leaves_nothing(model):
    before = trace(model)
    broken = model.model.layers[1].mlp
    with operated(model, SPARSE):
        handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            logits(model, tokens(1, 100))
        handle.remove()
        logits(model, tokens(1, 100))  # a new cache: nothing of the failed call remains
    assert trace(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.1}, "density and text go together"),
        ({"text": ["words"]}, "density and text go together"),
        ({"density": 0.1, "text": ["words"]}, "needs the model's tokenizer"),
        ({"density": 1.5, "text": ["words"], "tokenizer": object()}, "density=1.5"),
    ],
)
def test_an_operation_that_is_refused_leaves_nothing(model, arguments, message):
    before = trace(model)
    with pytest.raises(SurgeryError, match=message):
        operate(model, SPARSE, **arguments)
    assert trace(model) == before and not is_operated(model)


def test_operating_twice_is_refused_and_the_first_operation_stays(model):
    with operated(model, SPARSE):
        with pytest.raises(SurgeryError, match=r"operated already: eject\(model\) first"):
            operate(model, SINGLE)
        with pytest.raises(SurgeryError, match="part of one that is operated already"):
            operate(model.model, SINGLE)
        assert config_of(model) == SPARSE
        logits(model, tokens(1, 100))


@pytest.mark.parametrize("function", [eject, config_of, statistics, reset_statistics])
def test_what_needs_an_operated_model_says_so(model, function):
    with pytest.raises(SurgeryError, match=r"the model is not operated: call operate\(model\) first"):
        function(model)


def test_two_operated_models_at_once():
    one, other = build("Llama", 0), build("Llama", 1)
    untouched = trace(other)
    ids = tokens(1, 200)
    expected = {}
    for model, config in ((one, SPARSE), (other, SINGLE)):
        with operated(model, config):
            expected[model] = logits(model, ids)
    dense = logits(one, ids)
    operate(one, SPARSE)
    operate(other, SINGLE)
    assert torch.equal(logits(one, ids), expected[one])
    assert torch.equal(logits(other, ids), expected[other])
    assert statistics(one).by_tile.keys() == {"8"} and statistics(other).by_tile.keys() == {"1"}
    eject(one)
    assert torch.equal(logits(one, ids), dense)
    assert torch.equal(logits(other, ids), expected[other]), "the interface is still registered"
    eject(other)
    assert trace(other) == untouched


def test_a_copy_of_an_operated_model_lives_on_its_own(model):
    ids, before = tokens(1, 150), trace(model)
    dense = logits(model, ids)
    with operated(model, SPARSE):
        expected = logits(model, ids)
        twin = copy.deepcopy(model)
    assert not is_operated(model) and is_operated(twin)
    assert torch.equal(logits(twin, ids), expected)
    assert type(twin.generate(ids, max_new_tokens=2, return_dict_in_generate=True)[CACHE_NAME]) is PagedCache
    assert statistics(twin).rows > 0
    with operated(model, SPARSE):
        eject(twin)
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(twin, ids), dense)
    assert trace(model) == trace(twin) == before


def test_an_operated_model_can_be_pickled(model):
    ids = tokens(1, 150)
    with operated(model, SPARSE):
        expected, data = logits(model, ids), pickle.dumps(model)
    again = pickle.loads(data)
    assert torch.equal(logits(again, ids), expected)
    eject(again)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_defaults_operate_with_the_documented_configuration(model):
    with operated(model):
        assert config_of(model) == SurgeryConfig()


def test_an_operated_model_is_saved_as_the_dense_one(model, tmp_path):
    with operated(model, SPARSE):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert not is_operated(again)
    torch.testing.assert_close(logits(again.eval(), tokens(1, 90)), logits(model, tokens(1, 90)))


def test_the_backbone_alone_can_be_operated(model):
    ids = tokens(1, 200)
    with operated(model, SPARSE):
        expected = logits(model, ids)
    with operated(model.model, SPARSE) as backbone, torch.no_grad():
        torch.testing.assert_close(model.lm_head(backbone(ids).last_hidden_state), expected)


def test_a_model_wrapped_by_peft(model):
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, adapter).eval()
    ids = tokens(1, 150)
    dense, state = logits(wrapped, ids), weights(wrapped)
    operate(wrapped, DENSE_LIMIT)
    assert is_operated(wrapped)
    torch.testing.assert_close(logits(wrapped, ids), dense, rtol=1e-5, atol=1e-5)
    out = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(out[CACHE_NAME]) is PagedCache
    eject(wrapped)
    assert_same_weights(wrapped, state)
    assert torch.equal(logits(wrapped, ids), dense)
    with operated(wrapped, SPARSE):
        assert (logits(wrapped, ids) - dense).abs().max() > 1e-3


def test_training_a_lora_through_the_sparse_path(model):
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, adapter).train()
    ids = tokens(1, 150)
    with operated(wrapped, SPARSE):
        wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_a_model_spread_by_accelerate(model, tmp_path):
    ids = tokens(1, 150)
    model.save_pretrained(tmp_path)
    spread = type(model).from_pretrained(tmp_path, dtype=torch.float64, device_map="auto").eval()
    accelerate.dispatch_model(spread, {"": "cpu"}, force_hooks=True)
    dense = logits(spread, ids)
    with operated(spread, DENSE_LIMIT):
        torch.testing.assert_close(logits(spread, ids), dense, rtol=1e-5, atol=1e-5)
        spread.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(logits(spread, ids), dense)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("config", [SPARSE, SINGLE, DENSE_LIMIT], ids=["tiles", "single", "dense limit"])
def test_gradients_flow(model, config, use_cache):
    ids = tokens(2, 150)
    model.train()
    model(ids, labels=ids).loss.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with operated(model, config):
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if config is DENSE_LIMIT:
            torch.testing.assert_close(parameter.grad, dense[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_with_checkpointing(model):
    ids = tokens(1, 150)
    model.train()
    with operated(model, SPARSE):
        model(ids, labels=ids).loss.backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        # Renamed in transformers 5.23.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-6, atol=1e-9)


def test_gradients_flow_through_a_soft_cap():
    model = build("Gemma2", layer_types=["full_attention"] * 2, attn_logit_softcapping=3.0)
    model.set_attn_implementation("eager")
    model.train()
    with operated(model, SPARSE):
        model(tokens(1, 150), labels=tokens(1, 150)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def four_dimensional_mask():
    return torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions: operated layers never form attention weights"),
        (
            {"attention_mask": four_dimensional_mask()},
            "a mask that is not plainly causal.*2-D attention_mask",
        ),
        (
            {"position_ids": torch.cat((torch.arange(12), torch.arange(8)))[None]},
            "packed rows: position_ids start anew within a row.*unpack them and pad",
        ),
        (
            {"position_ids": torch.zeros(1, 20, dtype=torch.int64)},
            "packed rows: position_ids start anew within a row",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 12, 20])}, r"cu_seq_lens_q \(packed rows\) is not supported"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(model, arguments, message, use_cache):
    with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match=message):
        logits(model, tokens(1, 20), use_cache=use_cache, **arguments)


def test_packed_rows_given_by_place_are_refused_too(model):
    packed = torch.cat((torch.arange(12), torch.arange(8)))[None]
    with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match="packed rows"):
        model(tokens(1, 20), None, packed)


def test_a_cache_given_by_place_is_used(model):
    ids = tokens(1, 120)
    with operated(model, SPARSE), torch.no_grad():
        expected, _ = in_pieces(model, ids, [96])
        cache = model(ids[:, :96])[CACHE_NAME]
        got = model(ids[:, 96:], None, None, cache).logits
    assert torch.equal(got, expected[:, 96:])


def test_output_attentions_of_generate_and_of_the_config_are_refused(model):
    with operated(model, SPARSE), pytest.raises(UnsupportedModelError, match="output_attentions"):
        model.generate(tokens(1, 20), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_dropout_in_training_is_refused():
    model = build("Llama", attention_dropout=0.1)
    with operated(model, SPARSE):
        logits(model, tokens(1, 20))  # evaluation knows no dropout
        model.train()
        with pytest.raises(UnsupportedModelError, match="attention dropout: set attention_dropout=0"):
            model(tokens(1, 20))


def test_bidirectional_tokens_of_a_mask_are_refused():
    """transformers marks such tokens by a mask function of its own, here an image in the text."""
    from transformers import masking_utils

    model = build("Llama")
    original = masking_utils.create_causal_mask

    def with_image(**arguments):
        return original(**arguments, or_mask_function=lambda b, h, q, k: (q < 8) & (k < 8))

    module = __import__("sys").modules[type(model).__module__]
    with operated(model, SPARSE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "create_causal_mask", with_image)
        with pytest.raises(UnsupportedModelError, match="bidirectional image tokens"):
            logits(model, tokens(1, 20))


def test_public_names_are_those_of_the_contract():
    for name in ("operate", "eject", "operated", "is_operated", "statistics", "save_adapter", "load_adapter"):
        assert callable(getattr(llama_surgery, name)) and name in dir(llama_surgery)
    with pytest.raises(AttributeError, match="no attribute 'cure'"):
        llama_surgery.cure  # noqa: B018

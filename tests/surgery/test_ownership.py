"""Whose attention is replaced, where configurations are shared and copied and implementations change."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from tests.surgery.tiny import DENSE_LIMIT, SINGLE, SPARSE, build, logits, tokens
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, PreTrainedModel

from llama_surgery import (
    SurgeryError,
    UnsupportedModelError,
    eject,
    is_operated,
    operate,
    operated,
    statistics,
)
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.topology.router import PageRouter


@pytest.fixture
def model() -> PreTrainedModel:
    return build("Llama")


def changed_on_the_model(model):
    model.set_attn_implementation("sdpa")


def changed_on_a_part(model):
    model.model.set_attn_implementation("eager")


def assigned_to_the_configuration(model):
    model.config._attn_implementation = "sdpa"


def assigned_to_a_modules_configuration(model):
    model.model.layers[0].self_attn.config._attn_implementation_internal = "eager"


CHANGES = [
    changed_on_the_model,
    changed_on_a_part,
    assigned_to_the_configuration,
    assigned_to_a_modules_configuration,
]
EJECT_FIRST = r"implementation was changed to '\w+' while the model is operated: eject\(model\) first"


@pytest.mark.parametrize("change", CHANGES)
def test_another_implementation_on_an_operated_model_is_refused(model, change):
    """Dense attention on a paged cache would read the new tokens alone."""
    ids = tokens(1, 100)
    dense = logits(model, ids)
    operate(model, SPARSE)
    cache = model(ids)[CACHE_NAME]
    change(model)
    for call in (
        lambda: logits(model, ids),
        lambda: logits(model, ids, use_cache=False),
        lambda: logits(model, ids[:, :1], **{CACHE_NAME: cache}),
        lambda: model.model(ids),
        lambda: model.generate(ids, max_new_tokens=2, do_sample=False),
    ):
        with pytest.raises(SurgeryError, match=EJECT_FIRST):
            call()
    assert torch.equal(logits(eject(model), ids), dense)
    with pytest.raises(UnsupportedModelError, match="start with a new cache"):
        logits(model, ids[:, :1], **{CACHE_NAME: cache})


def test_another_implementation_on_a_peft_wrapper_is_refused(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    ids = tokens(1, 100)
    with operated(wrapped, SPARSE):
        wrapped.set_attn_implementation("eager")
        with pytest.raises(SurgeryError, match=EJECT_FIRST):
            wrapped.generate(input_ids=ids, max_new_tokens=2)
        with pytest.raises(SurgeryError, match=EJECT_FIRST):
            wrapped(input_ids=ids)


def test_the_attention_of_a_part_alone_cannot_be_changed_either():
    """Layers beside the operated ones, here sliding ones, attend densely by the same configuration."""
    kinds = ["sliding_attention", "full_attention"]
    model = build("Qwen3", layer_types=kinds, sliding_window=48, use_sliding_window=True)
    with operated(model, SPARSE):
        model.model.set_attn_implementation("sdpa")
        with pytest.raises(SurgeryError, match=EJECT_FIRST):
            logits(model, tokens(1, 100))


def the_same_object(model, folder):
    return type(model)(model.config)


def made_from_the_configuration(model, folder):
    return AutoModelForCausalLM.from_config(model.config)


def loaded_with_the_configuration(model, folder):
    return AutoModelForCausalLM.from_pretrained(folder, config=model.config)


def a_deep_copy(model, folder):
    return type(model)(copy.deepcopy(model.config))


def a_shallow_copy(model, folder):
    return type(model)(copy.copy(model.config))


def a_pickled_copy(model, folder):
    return type(model)(pickle.loads(pickle.dumps(model.config)))


def the_configuration_of_a_part(model, folder):
    return type(model)(model.model.layers[0].self_attn.config)


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


SHARED = [
    the_same_object,
    made_from_the_configuration,
    loaded_with_the_configuration,
    a_deep_copy,
    a_shallow_copy,
    a_pickled_copy,
    the_configuration_of_a_part,
    saved_and_loaded,
]


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("share", SHARED)
def test_a_dense_model_with_the_configuration_of_an_operated_one_stays_dense(model, share, base, tmp_path):
    ids = tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    model.set_attn_implementation(base)
    model.save_pretrained(tmp_path)
    dense, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    text = {"max_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **text)
    operate(model, SPARSE)
    sparse = logits(model, ids)
    other = share(model, tmp_path).to(torch.float64).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = copy.deepcopy(model.generation_config)
    for _ in range(2):
        assert not is_operated(other)
        torch.testing.assert_close(logits(other, ids), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            logits(other, ids, attention_mask=mask)[1], padded[1], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            logits(other, ids, attention_mask=mask)[0, :-9], padded[0, :-9], rtol=1e-5, atol=1e-5
        )
        assert torch.equal(other.generate(ids, **text), expected)
        assert torch.equal(other.generate(ids, **text, cache_implementation="static"), expected)
        if is_operated(model):
            assert torch.equal(logits(model, ids), sparse), "and the operated one operated"
            eject(model)


def test_the_loss_of_a_dense_model_that_shares_a_configuration(model, tmp_path):
    ids = tokens(1, 120)
    model.save_pretrained(tmp_path)
    dense = model(ids, labels=ids).loss
    with operated(model, SPARSE):
        other = AutoModelForCausalLM.from_pretrained(
            tmp_path, config=model.config, dtype=torch.float64
        ).eval()
        torch.testing.assert_close(other(ids, labels=ids).loss, dense, rtol=1e-6, atol=1e-6)


def test_two_operated_models_on_one_configuration(model):
    """Each is operated and ejected by itself, in any order; what is left alone is dense."""
    other = type(model)(model.config).to(torch.float64).eval()
    other.load_state_dict(model.state_dict())
    ids, base = tokens(1, 150), model.config._attn_implementation
    dense = logits(model, ids)
    operate(model, SPARSE)
    expected = logits(model, ids)
    operate(other, SINGLE)
    single = logits(other, ids)
    assert torch.equal(logits(model, ids), expected)
    eject(model)
    assert torch.equal(logits(model, ids), dense)
    assert torch.equal(logits(other, ids), single)
    operate(model, SPARSE)
    eject(other)
    assert torch.equal(logits(other, ids), dense)
    assert torch.equal(logits(model, ids), expected)
    eject(model)
    assert model.config._attn_implementation == base and type(model.config._attn_implementation) is str


def test_a_dense_model_on_the_same_configuration_can_be_operated_after_the_other_is_gone(model):
    operate(model, SPARSE)
    other = type(model)(copy.copy(model.config)).to(torch.float64).eval()
    eject(model)
    ids = tokens(1, 150)
    dense = logits(other, ids)
    with operated(other, DENSE_LIMIT):
        assert statistics(other).rows == 0
        torch.testing.assert_close(logits(other, ids), dense, rtol=1e-5, atol=1e-5)
        assert statistics(other).rows > 0
    assert other.config._attn_implementation == "sdpa"


def test_a_configuration_pickled_while_operated_loads_without_this_package(model, tmp_path):
    operate(model, SPARSE)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(model.config))
    eject(model)
    code = (
        "import pickle, sys; from transformers import AutoModelForCausalLM;"
        "config = pickle.load(open(sys.argv[1], 'rb'));"
        "model = AutoModelForCausalLM.from_config(config);"
        "assert 'llama_surgery' not in sys.modules and model.config._attn_implementation == 'sdpa'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.pickle")], check=True)


def test_the_name_on_the_configuration_is_a_plain_string_while_a_call_runs(model):
    """torch.compile of torch 2.11 takes no other for a constant; copies made between calls are dense."""
    kinds: list[type] = []
    handle = model.model.register_forward_pre_hook(
        lambda *_: kinds.append(type(model.config._attn_implementation))
    )
    with operated(model, SPARSE, routers={}):
        logits(model, tokens(1, 20))
        assert copy.deepcopy(model.config)._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 4))  # no indices of tokens
        assert copy.deepcopy(model.config)._attn_implementation == "sdpa"
    handle.remove()
    assert kinds == [str, str]


def test_copies_of_an_operated_model_are_operated_and_keep_apart(model):
    ids = tokens(1, 150)
    dense = logits(model, ids)
    operate(model, SPARSE)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config is not model.config
        assert torch.equal(logits(twin, ids), expected)
        eject(twin)
        assert torch.equal(logits(twin, ids), dense)
        assert torch.equal(logits(model, ids), expected)
    part = copy.deepcopy(model.model)
    eject(model)
    with torch.no_grad():
        states = part(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.lm_head(states), expected)


def test_an_interrupted_call_leaves_no_other_model_operated(model):
    """Hooks do not run when the user interrupts; a model on the same configuration is dense all the same."""
    other = type(model)(model.config).to(torch.float64).eval()
    model.set_attn_implementation("eager")
    ids = tokens(1, 100)
    dense = logits(other, ids)
    operate(model, SPARSE)
    expected = logits(model, ids)
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids)
    handle.remove()
    torch.testing.assert_close(logits(other, ids), dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, ids), expected)
    eject(model)
    torch.testing.assert_close(logits(other, ids), dense, rtol=1e-5, atol=1e-5)


def test_a_refused_operation_leaves_another_model_operated(model):
    other, ids = build("Llama", 1), tokens(1, 150)
    operate(model, SPARSE)
    expected = logits(model, ids)
    bad = PageRouter(offset=torch.zeros(3, 3))
    for arguments in ({"routers": {0: bad}}, {"routers": {7: bad}}, {"density": 0.1, "text": ["words"]}):
        with pytest.raises(SurgeryError):
            operate(other, SPARSE, **arguments)
        assert "_llama_surgery" not in other.__dict__ and not other._forward_pre_hooks
        with torch.no_grad():  # a part, whose call nothing of the whole model precedes
            states = model.model(ids, use_cache=False).last_hidden_state
            assert torch.equal(model.lm_head(states), expected)
    assert torch.equal(logits(model, ids), expected)


def test_a_part_of_an_operated_model_keeps_a_paged_cache_of_its_own(model):
    ids = tokens(1, 200)
    with operated(model, SPARSE), torch.no_grad():
        whole = model.model(ids)
        out = model.model(ids[:, :128])
        out = model.model(ids[:, 128:], **{CACHE_NAME: out[CACHE_NAME]})
    torch.testing.assert_close(out.last_hidden_state, whole.last_hidden_state[:, 128:])


def test_one_configuration_of_two_kinds_of_models(model):
    """A backbone made from an operated model's configuration."""
    ids = tokens(1, 100)
    with torch.no_grad():
        dense = model.model(ids).last_hidden_state
        with operated(model, SPARSE):
            backbone = AutoModel.from_config(model.config).to(torch.float64).eval()
            backbone.load_state_dict(model.model.state_dict())
            torch.testing.assert_close(backbone(ids).last_hidden_state, dense)


def test_flash_attention_of_other_layers_is_loaded_by_its_own_name(monkeypatch):
    """It asks the configuration of the module which of its releases to load."""
    kinds = ["sliding_attention", "full_attention"]
    model = build("Qwen3", layer_types=kinds, sliding_window=48, use_sliding_window=True)
    asked = []

    def flash(module, query, key, value, mask, **keywords):
        asked.append((module.config._attn_implementation, module.layer_idx, keywords["sliding_window"]))
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    with operated(model, SPARSE, routers={}):
        logits(model, tokens(1, 100))
    assert asked == [("flash_attention_2", 0, 48)]
    assert model.config._attn_implementation == "flash_attention_2"


def test_dense_cross_attention_beside_operated_layers_stays_without_a_causal_mask(model):
    """Also where it reads as many states as there are tokens."""

    class SomeCrossAttention(torch.nn.Module):
        config = model.config

    given = []

    def listen(module, args, result):
        states = torch.ones(1, 4, 100, 16)
        attend = AttentionInterface._global_mapping[model.config._attn_implementation]
        for foreign in (SomeCrossAttention(), model.model.layers[0].mlp):
            attend(foreign, states, states, states, None)

    def dense(module, query, key, value, mask, **keywords):
        given.append(mask)
        return query.transpose(1, 2), None

    mask = torch.ones(1, 100, dtype=torch.int64)
    mask[0, :5] = 0
    with operated(model, SPARSE), pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", dense)
        model.model.layers[0].register_forward_hook(listen)
        logits(model, tokens(1, 100), attention_mask=mask)
    assert given[0] is None and given[1].shape == (1, 1, 100, 100)

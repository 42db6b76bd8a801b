"""Adapters: saved, loaded, refused."""

import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.surgery.tiny import SPARSE, build, logits, tokens
from transformers import AutoModelForCausalLM

from llama_surgery import (
    AdapterError,
    SurgeryConfig,
    SurgeryError,
    config_of,
    eject,
    is_operated,
    load_adapter,
    operated,
    save_adapter,
    statistics,
)
from llama_surgery.surgery.adapter import CONFIG_FILE, TENSOR_FILE, weights_digest
from llama_surgery.topology.router import PageRouter

FIXTURE = Path(__file__).parent.parent / "fixtures" / "adapter-v1"


@pytest.fixture
def folder(tmp_path):
    with operated(build("Llama"), SPARSE) as model:
        save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@contextlib.contextmanager
def loaded(model, folder):
    """A model with an adapter, ejected at the end."""
    assert load_adapter(model, folder) is model
    try:
        yield model
    finally:
        eject(model)


def rewrite(folder, **changes):
    """Change fields of the description; a callable gets the old value."""
    path = folder / CONFIG_FILE
    description = json.loads(path.read_text())
    for name, value in changes.items():
        description[name] = value(description[name]) if callable(value) else value
    path.write_text(json.dumps(description))


def refused(folder, message, model=None):
    model = build("Llama") if model is None else model
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert not is_operated(model)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])  # of which one ignores num_key_value_heads
def test_an_adapter_gives_the_same_outputs_again(kind, tmp_path):
    config = dataclasses.replace(SPARSE, theta=0.1234567, theta_decode=0.07, dense_until=64)
    ids = tokens(1, 250)
    with operated(build(kind), config) as model:
        expected = logits(model, ids)
        save_adapter(model, str(tmp_path / "adapter"))
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    with loaded(build(kind), str(tmp_path / "adapter")) as model:
        assert config_of(model) == config
        assert torch.equal(logits(model, ids), expected)


def test_saving_again_replaces_what_is_there(folder):
    with operated(build("Llama", seed=1), dataclasses.replace(SPARSE, theta=0.5)) as model:
        save_adapter(model, folder)
    with loaded(build("Llama", seed=1), folder) as model:
        assert config_of(model).theta == 0.5


@pytest.mark.parametrize("left", ["all", "tensors", "configuration"])
def test_an_adapter_of_peft_is_not_written_over(tmp_path, left):
    wrapped = peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    if left != "all":
        (tmp_path / (CONFIG_FILE if left == "tensors" else TENSOR_FILE)).unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with operated(wrapped.eval(), SPARSE), pytest.raises(SurgeryError, match="another library"):
        save_adapter(wrapped, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    if left == "all":
        peft.PeftModel.from_pretrained(build("Llama"), tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_a_model_still_loads_after_a_refused_save(tmp_path, linked):
    model = build("Llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / ("link" if linked else "model")
    if linked:
        folder.symlink_to(tmp_path / "model")
    with operated(model, SPARSE):
        with pytest.raises(SurgeryError, match=r"holds a model \(config.json\)"):
            save_adapter(model, folder)
        save_adapter(model, folder / "adapter")  # within it, but in a folder of its own
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_an_adapter_serves_the_same_weights_in_low_precision(folder):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with loaded(build("Llama", dtype=dtype), folder) as model:
            assert is_operated(model)


def test_a_model_that_is_not_operated_has_nothing_to_save(tmp_path):
    with pytest.raises(SurgeryError, match="not operated"):
        save_adapter(build("Llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_operated_model_takes_no_second_adapter(folder):
    with operated(build("Llama"), SPARSE) as model, pytest.raises(SurgeryError, match="operated already"):
        load_adapter(model, folder)


def test_another_architecture_is_refused(folder):
    refused(folder, "of another model .*model_type: adapter 'llama', model 'qwen2'", build("Qwen2"))


def test_another_size_is_refused(folder):
    refused(folder, "num_hidden_layers: adapter 2, model 3", build("Llama", num_hidden_layers=3))
    refused(folder, "num_key_value_heads: adapter 2, model 4", build("Llama", num_key_value_heads=4))


def test_other_weights_are_refused(folder):
    refused(folder, "of this shape with other weights.*Calibrate on this model", build("Llama", seed=1))


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}.* is missing: an adapter is a folder with")


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere.* is missing")


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file: an adapter is a folder with")


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "llama-surgery"', "\x00\xff", "nonsense"])
def test_a_damaged_description_is_refused(folder, text):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    refused(folder, "is damaged: .*Save it again")


@pytest.mark.parametrize("size", [0, 4, 20, -1, -100])
def test_truncated_tensors_are_refused(folder, size):
    data = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(data[:size])
    refused(folder, "is damaged: .*Save it again")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"peft_type": "LORA"}'])
def test_a_description_of_something_else_is_refused(folder, text):
    (folder / CONFIG_FILE).write_text(text)
    refused(folder, "does not describe a llama-surgery adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format version 3; this release reads up to 2. Update llama-surgery"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": None}, "format version None"),
        ({"surgery": lambda old: {**old, "version": 99}}, "configuration version 99"),
        ({"surgery": lambda old: {**old, "colour": "red"}}, "unknown configuration fields: colour"),
        ({"surgery": lambda old: {**old, "window": 33}}, "window=33 is not a multiple of tile"),
        ({"surgery": lambda old: {**old, "theta": "high"}}, "theta='high'"),
        ({"surgery": "pages"}, CONFIG_FILE),
        ({"surgery": None}, CONFIG_FILE),
        ({"surgery": [1, 2]}, CONFIG_FILE),
        ({"base_model": "llama"}, "is damaged: .*base model"),
        ({"base_model": None}, "is damaged: .*base model"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(folder, changes, message):
    rewrite(folder, **changes)
    refused(folder, message)


def test_missing_parts_are_named(folder):
    path = folder / CONFIG_FILE
    description = json.loads(path.read_text())
    del description["surgery"]
    path.write_text(json.dumps(description))
    refused(folder, "surgery missing")
    save_file({"other": torch.zeros(3)}, folder / TENSOR_FILE)
    refused(folder, "fingerprint, surgery missing")


def test_a_fingerprint_of_another_shape_is_refused(folder):
    save_file({"fingerprint": torch.zeros(7)}, folder / TENSOR_FILE)
    refused(folder, "other weights")


@pytest.mark.parametrize("where", ["first write", "second write", "replace"])
def test_a_full_disk_leaves_the_old_adapter(folder, monkeypatch, where):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls = []

    def full(original, after):
        def call(*arguments, **keywords):
            calls.append(original)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **keywords)

        return call

    with operated(build("Llama"), dataclasses.replace(SPARSE, theta=0.5)) as model:
        if where == "replace":
            monkeypatch.setattr(os, "replace", full(os.replace, 0))
        elif where == "first write":
            monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes, 0))
        else:
            monkeypatch.setattr(Path, "write_text", full(Path.write_text, 0))
        with pytest.raises(SurgeryError, match=r"could not write .*No space left on device"):
            save_adapter(model, folder)
        monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with loaded(build("Llama"), folder) as model:
        assert config_of(model) == SPARSE


def test_learned_corrections_and_thresholds_are_replaced_together(tmp_path, monkeypatch):
    router = PageRouter(offset=torch.full((2, 2), 0.5))
    with operated(build("Llama"), SPARSE, routers={0: router}) as model:
        save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)  # that of the description, which comes second
    with (
        operated(build("Llama"), SPARSE, routers={0: PageRouter(offset=torch.zeros(2, 2))}) as model,
        pytest.raises(SurgeryError, match="No space left"),
    ):
        save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_half_written_new_adapter_is_no_adapter(tmp_path, monkeypatch):
    def full(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with operated(build("Llama"), SPARSE) as model:
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(SurgeryError, match="No space left"):
            save_adapter(model, tmp_path)
        monkeypatch.undo()
    refused(tmp_path, f"{CONFIG_FILE}.* is missing")
    with operated(build("Llama"), SPARSE) as model:
        save_adapter(model, tmp_path)
    with loaded(build("Llama"), tmp_path) as model:
        assert config_of(model) == SPARSE


def test_an_adapter_of_a_rule_that_is_gone_is_refused_with_the_reason(folder):
    rewrite(
        folder, surgery=lambda stored: stored | {"alpha": 1.0, "score_stride": 1, "coarse_to_fine": False}
    )
    with loaded(build("Llama"), folder) as model:
        assert config_of(model) == SPARSE
    rewrite(folder, surgery=lambda stored: stored | {"score_stride": 4})
    refused(folder, "score_stride=4 is no longer supported, .* Operate and calibrate the model again")


def fixture_model():
    """A model whose weights are a formula, so that no release of a library can change them."""
    model = build("Llama")
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            if weight.dim() > 1:
                n = torch.arange(weight.numel(), dtype=torch.float64)
                weight.copy_((0.21 * torch.sin(n * (1.3 + 0.1 * i) + n.square() * 0.017)).view_as(weight))
    return model


def test_an_adapter_saved_by_the_first_release_gives_the_same_outputs():
    with loaded(fixture_model(), FIXTURE) as model:
        sizes = {"chunk_size": 64, "page_size": 16, "window": 32, "tile": 8}
        assert config_of(model) == SurgeryConfig(**sizes, theta=0.15, theta_decode=0.1, summary="none")
        got = logits(model, torch.arange(250)[None] * 37 % 94 + 3)
        assert 0.05 < statistics(model).far_density < 0.5
    expected = load_file(FIXTURE / "expected.safetensors")["logits"]
    torch.testing.assert_close(got[0, ::50].float(), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_told_apart_and_a_topology_changes_none() -> None:
    one, other = build("Llama"), build("Llama")
    before = weights_digest(one)
    assert before == weights_digest(other)
    with operated(one, SPARSE):
        assert weights_digest(one) == before
    with torch.no_grad():
        list(other.parameters())[-1].add_(1)
    assert weights_digest(other) != before


@pytest.mark.parametrize(
    "damage",
    [
        {"base_model": {}},
        {"measured_loss": {**dict.fromkeys(("max_loss", "loss", "low", "high"), "0.1"), "windows": 1}},
        {"format_version": -3},
    ],
)
def test_a_description_that_lacks_what_is_compared_is_refused(folder, damage):
    rewrite(folder, **damage)
    with pytest.raises(AdapterError, match="adapter"):
        load_adapter(build("Llama"), folder)


def test_numbers_of_a_fingerprint_are_compared_whatever_they_are_kept_as(folder):
    tensors = load_file(folder / TENSOR_FILE)
    save_file({**tensors, "fingerprint": tensors["fingerprint"].int()}, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match="other weights"):
        load_adapter(build("Llama"), folder)

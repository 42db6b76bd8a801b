"""What was learned travels in the adapter and runs on the ordinary path: prefill, decode, generate()."""

import json
from pathlib import Path

import pytest
import torch
from tests.learning.test_gates import corrections
from tests.surgery.tiny import SINGLE, SPARSE, in_pieces, llama, logits, tokens

from llama_surgery import AdapterError, SurgeryError, eject, load_adapter, operate, operated, save_adapter
from llama_surgery.learning.corrections import scorer_parameters
from llama_surgery.surgery.operation import routers_of
from llama_surgery.topology.router import PageRouter


def test_an_adapter_keeps_what_was_learned(tmp_path: Path) -> None:
    model, ids = llama(), tokens(256)
    with operated(model, SPARSE):
        plain = logits(model, ids)
    operate(model, SPARSE, routers=scorer_parameters(corrections(1).float()))
    learned = logits(model, ids)
    save_adapter(model, tmp_path)
    eject(model)
    load_adapter(model, tmp_path)
    try:
        assert torch.equal(learned, logits(model, ids)) and not torch.equal(learned, plain)
        assert sorted(routers_of(model)) == [0, 1]
    finally:
        eject(model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 2


def test_cuts_do_not_matter_with_learned_corrections() -> None:
    model, ids = llama(), tokens(200)
    with operated(model, SINGLE, routers=scorer_parameters(corrections(2))):
        whole, _ = in_pieces(model, ids, [])
        pieces, _ = in_pieces(model, ids, [7, 8, 90, 150, 151])
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-9)


def test_generation_runs_with_learned_corrections() -> None:
    model, ids = llama(), tokens(150)[None]
    with operated(model, SPARSE, routers=scorer_parameters(corrections(3))):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 154)


def test_corrections_of_another_model_are_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(SurgeryError, match=r"layers \[7\]"):
        operate(model, SPARSE, routers={7: PageRouter()})
    with pytest.raises(SurgeryError, match="offset"):
        operate(model, SPARSE, routers={0: PageRouter(offset=torch.zeros(3, 3))})
    with operated(model, SPARSE, routers=scorer_parameters(corrections(4).float())):
        save_adapter(model, tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["router.0.unheard_of"] = torch.zeros(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="Update llama-surgery"):
        load_adapter(model, tmp_path)

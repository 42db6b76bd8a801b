"""What commands share: numbers of tokens, loading a model."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.timing.model import random_model
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from llama_surgery import checkpoint
from llama_surgery.cli import common
from llama_surgery.cli.common import Dtype, load_model, load_tokenizer
from llama_surgery.cli.options import split_values, token_counts
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import model_name
from llama_surgery.learning.weights import Weights, skeleton
from llama_surgery.serving.export import export


def test_token_counts() -> None:
    assert token_counts(["8k,4096", "16K", "8192"]) == [4096, 8192, 16384]
    for wrong in ("k", "0", "-1", "4.5k", "²"):
        with pytest.raises(SurgeryError, match="give a number of tokens"):
            token_counts([wrong])


def test_values_after_commas_and_repeated() -> None:
    assert split_values(["a, b", "", "b,c,"]) == ["a", "b", "c"]


def test_a_model_is_spread_by_accelerate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    split, _ = load_model(str(model), "split", Dtype.float32)
    whole, _ = load_model(str(model), "cpu", Dtype.float32)
    ids = torch.arange(20)[None]
    assert not split.training
    # On a GPU the split model runs there, with other roundings.
    torch.testing.assert_close(split(ids.to(split.device)).logits.cpu(), whole(ids).logits)
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="pip install accelerate"):
        load_model(str(model), "split", Dtype.auto)


def write_gguf(file: Path, model: PreTrainedModel, tokenizer: Path) -> None:
    """A Qwen 2, whose weights lie in a GGUF file as they are, with the first words of a tokenizer."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    words = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    known = sorted(words["vocab"], key=words["vocab"].get)[: config.vocab_size]
    writer.add_token_list(known)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in words["merges"] if "".join(pair) in known])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_plain_dense_model(
    tmp_path: Path, demo_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    written = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True)).eval()
    file = tmp_path / "weights.bin"  # told by what it holds, not by its name
    write_gguf(file, written, demo_model_path)
    ids = torch.arange(5, 60)[None]
    for dtype, held in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        model, tokenizer = load_model(str(file), "cpu", Dtype(dtype))
        assert model.dtype == held and not model.training and model_name(model) == file.name
        assert getattr(model.config, "quantization_config", None) is None
        close = {torch.float32: 1e-6, torch.bfloat16: 0.05}[held]
        assert (model(ids).logits.float() - written(ids).logits).abs().max() < close
    text = "The secret number of Bosera is 48213."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and 0 < len(ids) < len(text) and max(ids) < 400
    assert load_tokenizer(str(file))(text).input_ids == ids
    assert skeleton(file).config.to_dict()["hidden_size"] == 32
    assert (
        random_model(file, torch.device("cpu"), torch.float32)(torch.arange(9)[None]).logits.isfinite().all()
    )
    export(file, tmp_path / "served")
    served, _ = load_model(str(tmp_path / "served"), "cpu", Dtype.float32)
    assert (
        served(torch.arange(5, 60)[None]).logits - written(torch.arange(5, 60)[None]).logits
    ).abs().max() < 0.05
    with pytest.raises(SurgeryError, match="is a GGUF file, and streaming reads safetensors"):
        Weights(file)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(SurgeryError, match=r"is a GGUF file.*pip install gguf\.$"):
        load_model(str(file), "cpu", Dtype.auto)


def test_what_calls_itself_gguf_and_is_not_is_told_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"", b"GGU", b"GGUF", b"GGUF and something else", b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(SurgeryError, match=r"could not load|pip install"):
            load_model(str(file), "cpu", Dtype.auto)

"""The exported folder: the dense model for transformers, an operated one for the engine."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.runner import run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llama_surgery import SurgeryConfig, SurgeryError, eject, operate, save_adapter
from llama_surgery.serving.export import export
from llama_surgery.serving.families import check_cache_dtype, read_block
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8, theta=0.2, theta_decode=0.1)
IDS = torch.arange(3, 90)[None]


def save_llama(folder: Path, shard_size: str, *, tied: bool = False) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in several files with an index, and a tokenizer's file beside it."""
    folder = save_llama(tmp_path_factory.mktemp("checkpoint"), "20KB")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def adapter_of(checkpoint: Path, folder: Path, routers: Any = None, config: SurgeryConfig = CONFIG) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    save_adapter(operate(model, config, routers=routers), folder)
    return folder


def learned() -> dict[int, PageRouter]:
    return {1: PageRouter(offset=torch.full((2, 2), 0.5), key_map=torch.eye(8).repeat(2, 1, 1))}


def test_transformers_opens_the_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, tmp_path / "adapter", learned())
    export(checkpoint, tmp_path / "out", adapter)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(opened) is LlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(dense(IDS).logits, opened(IDS).logits)
    operate(opened, CONFIG)
    eject(opened)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_tied_weights(tmp_path: Path, sharded: bool) -> None:
    source = save_llama(tmp_path / "source", "20KB" if sharded else "1GB", tied=True)
    export(source, tmp_path / "out", adapter_of(source, tmp_path / "adapter", learned()))
    weights = sorted(source.glob("model*.safetensors"))
    assert (len(weights) > 1) == sharded
    for file in weights:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(source)(IDS).logits, opened(IDS).logits)


def test_folder_says_what_the_engine_needs(checkpoint: Path, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, tmp_path / "adapter", learned())
    assert export(checkpoint, tmp_path / "out", adapter) == CONFIG
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["SurgeryLlamaForCausalLM"] and written["model_type"] == "llama"
    assert read_block(written["surgery"]) == (CONFIG, {1: ["key_map", "offset"]})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.router.offset"
    assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], torch.full((2, 2), 0.5))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_nothing_leads_the_engine_to_the_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    """Neither code named by auto_map nor a second copy of the weights, as some Mistral folders hold."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    described = json.loads((source / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (source / "config.json").write_text(json.dumps(described))
    for name in ("params.json", "consolidated.safetensors", "consolidated.safetensors.index.json"):
        (source / name).write_text("{}")
    export(source, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "params.json" not in names and not any(name.startswith("consolidated") for name in names)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_without_adapter_the_default_topology_is_written(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "out") == SurgeryConfig()
    names = load_file(tmp_path / "out" / "router.safetensors")
    assert names and all(name.endswith("key_weight") for name in names)  # the metric of the queries


def test_nothing_is_left_behind_when_the_disk_is_full(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(SurgeryError, match="No space left"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_served_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, tmp_path / "adapter", config=SurgeryConfig(backend="reference"))
    with pytest.raises(SurgeryError, match="does not serve"):
        export(checkpoint, tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, tmp_path / "adapter")
    done = run("export", checkpoint, adapter, tmp_path / "out")
    assert done.exit_code == 0 and "θ = 20.000% in prefill, 10.000% in decode" in done.output
    done = run("export", checkpoint, tmp_path / "plain", "--json")
    assert json.loads(done.stdout)["config"] == SurgeryConfig().to_dict()
    assert run("export", checkpoint, tmp_path / "plain").exit_code == 1
    assert run("export", checkpoint, adapter, tmp_path / "a", tmp_path / "b").exit_code == 2


def test_clear_errors(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="Give the folder of a Hugging Face checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "out")
    export(checkpoint, tmp_path / "out")
    with pytest.raises(SurgeryError, match="is there already"):
        export(checkpoint, tmp_path / "out")
    with pytest.raises(SurgeryError, match="exported model already"):
        export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(SurgeryError, match="adapter"):
        export(checkpoint, tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "Gemma3ForCausalLM", "GptOssForCausalLM"])
def test_families_that_are_not_served(checkpoint: Path, tmp_path: Path, family: str) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**described, "architectures": [family]}))
    with pytest.raises(SurgeryError, match=rf"{family}\. Served are"):
        export(other, tmp_path / "out")


def test_quantised_keys_are_not_served() -> None:
    for name in ("auto", "float32", "bfloat16", "float16"):
        check_cache_dtype(name, "--kv-cache-dtype")
    for name in ("fp8", "fp8_e4m3", "nvfp4", "int8_per_token_head"):
        with pytest.raises(SurgeryError, match=f"kv_cache_dtype {name}: quantised keys and values are not"):
            check_cache_dtype(name, "model.layers.0.self_attn.attn.kv_cache_dtype")


def test_sliding_windows_are_not_served(tmp_path: Path) -> None:
    """Nor the other layers of such a model: no served model is dense in part."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = Qwen2Config(**sizes, **windows, num_key_value_heads=2, num_hidden_layers=2)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(SurgeryError, match="1 of 2 layers have full attention: models with sliding-window"):
        export(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "no whole 'surgery' block"),
        ({"version": 1}, "no whole 'surgery' block"),
        ({"version": 99, "config": {}}, "version 99"),
        ({"version": 1, "config": {"backend": "reference"}}, "backend='reference' does not serve"),
    ],
)
def test_damaged_blocks(block: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        read_block(block)


def test_an_adapter_among_the_files_of_the_model_is_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would take its tensors for weights. An earlier release wrote it there, where told to."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    adapter = adapter_of(checkpoint, tmp_path / "adapter")
    for file in adapter.iterdir():
        shutil.copy(file, source)
    if find_spec("peft"):
        with pytest.raises(SurgeryError, match="to a folder of their own"):
            export(source, tmp_path / "out", adapter)
    # Without PEFT it can be loaded.
    monkeypatch.setattr("llama_surgery.checkpoint.find_spec", lambda name: None)
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    export(source, tmp_path / "out", adapter)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & {
        f.name for f in (tmp_path / "out").iterdir()
    }


def test_an_adapter_of_another_library_is_to_be_merged_first(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"another library .*merge it into the weights first"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_to_an_empty_folder_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "folder")
    export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "folder" / "config.json").is_file()

"""``llama-surgery doctor``."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, _device, load_model, look_for, precision
from llama_surgery.cli.console import escape, print_json, progress, say, speed_told, status
from llama_surgery.folders import check_complete

if TYPE_CHECKING:
    import torch

    from llama_surgery.config import SurgeryConfig


def doctor(
    *,
    model: options.Shape,
    adapter: options.Adapter = None,
    text: options.own(
        Path | None, "Text to time prompts of, a .txt file or a folder: needs --adapter, reads the weights."
    ) = None,
    write: options.own(bool, "Write the position into --adapter.", "--write") = False,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
) -> None:
    """Say whether a model can be operated, what will execute it here, and from which position on that pays.

    The last with --text: whole prompts of rising length are read, dense and operated, for half a minute or
    more. What comes out is a value for dense_until: queries below that position see everything. It is a
    position, so that no logit depends on how a text arrives. Example:

    llama-surgery doctor demo/books-26m --adapter adapter --text demo/text/calibration.txt --write
    """
    if text is not None and adapter is None:
        raise typer.BadParameter("--text needs --adapter: what is timed depends on its thresholds.")
    if write and text is None:
        raise typer.BadParameter("--write needs --text: prompts that are timed.")
    if adapter is not None:
        check_complete(adapter)
    look_for(model)
    with status("Loading PyTorch and transformers …"):
        import torch

        from llama_surgery.config import SurgeryConfig
        from llama_surgery.surgery.adapter import read_config, write_config

        config, measured = (SurgeryConfig(), None) if adapter is None else read_config(adapter)
        target = _device("auto" if device == "split" else device)
        wanted = precision(dtype, target, torch.bfloat16 if target.type == "cuda" else torch.float32)
        head_dim, told = _patient(model)
    told = {"Machine": _machine(target), **told, **_executor(config, head_dim, target, wanted)}
    if measured is not None:
        told["Loss"] = str(measured)
    if not json:
        for name, value in told.items():
            say(f"[bold]{name}:[/] {escape(value)}")
    if text is None or adapter is None:
        if json:
            print_json(told)
        return
    until, advice = _pays(model, adapter, text, device, dtype)
    if write:
        write_config(adapter, dataclasses.replace(config, dense_until=until))
    if json:
        print_json({**told, "advice": advice, "dense_until": until})
        return
    say(advice)
    if write:
        say(f"dense_until = {until} is written into {adapter}.")


def _pays(model: str, adapter: Path, text: Path, device: str, dtype: Dtype) -> tuple[int, str]:
    """``dense_until`` by times of whole prompts, and what it means."""
    from llama_surgery.text import read_texts

    texts = read_texts(text)
    llm, tokenizer = load_model(model, device, dtype)
    from llama_surgery.surgery.adapter import load_adapter
    from llama_surgery.surgery.calibrate import calibration_windows
    from llama_surgery.surgery.context import context_length
    from llama_surgery.surgery.operation import config_of, set_config
    from llama_surgery.surgery.pays import measured_dense_until

    load_adapter(llm, adapter)
    set_config(llm, dataclasses.replace(config_of(llm), dense_until=0))
    ids = calibration_windows(llm, tokenizer, texts, None, config_of(llm))
    with progress() as tell:
        until = measured_dense_until(llm, ids, progress=tell)
    return until, speed_told(until, context_length(llm))


def _machine(device: "torch.device") -> str:
    import torch

    told = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    if device.type != "cuda":
        return f"{told}, no GPU is used ({device.type})"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{told}, {torch.cuda.get_device_name(device)} with {memory:.0f} GB"


def _patient(model: str) -> tuple[int, dict[str, str]]:
    """Channels of a head, and what is to be said of the model; raises SurgeryError where there is none."""
    from llama_surgery.checkpoint import without_weights
    from llama_surgery.surgery.context import context_length
    from llama_surgery.surgery.supported import attention_modules, head_shape

    bones = without_weights(model)
    found = attention_modules(bones)
    kv_heads, group, dim = head_shape(bones, next(iter(found.values())))
    layers, context = bones.config.get_text_config().num_hidden_layers, context_length(bones)
    million = sum(parameter.numel() for parameter in bones.parameters()) / 1e6
    told = (
        f"{type(bones).__name__}, {million:,.0f} million parameters; {len(found)} of {layers} layers can be "
        f"operated, {kv_heads * group} query and {kv_heads} KV heads of {dim}"
    )
    return dim, {"Model": told + ("" if context is None else f"; made for {context:,} tokens")}


def _executor(
    config: "SurgeryConfig", head_dim: int, device: "torch.device", dtype: "torch.dtype"
) -> dict[str, str]:
    """What will execute prompts and decode steps, and why nothing faster."""
    import torch

    from llama_surgery.attention.executor import backend_name
    from llama_surgery.attention.impl.triton import obstacle

    if config.topology != "pages":
        return dict.fromkeys(("Prefill", "Decode"), "plain PyTorch, which masks and skips nothing")
    states = torch.empty(1, head_dim, device=device, dtype=dtype)
    told: dict[str, str] = {}
    for phase, tile in (("Prefill", config.tile), ("Decode", 1)):
        name, reason = backend_name(config, states, states, tile), obstacle(config, states, states, tile)
        kernels = "Triton kernels" if name == "triton" else f"plain PyTorch ({name!r})"
        told[phase] = kernels + ("" if reason is None else f", as Triton kernels cannot: {reason}")
    if config.theta_decode == 0:
        told["Decode"] += "; decode steps read everything (theta_decode = 0), so they gain nothing"
    return told

"""``llama-surgery doctor``."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llama_surgery.cli.common import (
    AdapterOption,
    DeviceOption,
    Dtype,
    JsonOption,
    ShapeArgument,
    look_for,
    own_option,
)
from llama_surgery.cli.console import escape, out, print_json, status
from llama_surgery.cli.tables import make_table
from llama_surgery.cli.values import SHARE, token_counts
from llama_surgery.folders import check_complete

if TYPE_CHECKING:
    import torch

    from llama_surgery.bench.crossover import Heads, Point
    from llama_surgery.config import SurgeryConfig


def doctor(
    *,
    model: ShapeArgument,
    adapter: AdapterOption = None,
    density: own_option(
        float, "Executed far density at the largest length, for which a threshold is found.", **SHARE
    ) = 0.06,
    length: own_option(list[str] | None, "Tokens, as 4096 or 4k. May be repeated.") = None,
    write: own_option(bool, "Write the position into --adapter.", "--write") = False,
    seconds: own_option(float, "No further length begins after this many.", min=1) = 60.0,
    csv: own_option(Path, "CSV of the times, written as measured.", "--csv") = Path("out/doctor.csv"),
    device: DeviceOption = "auto",
    dtype: Dtype = Dtype.auto,
    json: JsonOption = False,
) -> None:
    """Say whether a model can be operated, what will execute it here, and from which position on that pays.

    Attention of one layer of the model's shape is timed at rising lengths, dense and operated, layout and
    selection included. What comes out is a value for dense_until: queries below that position see everything.
    It is a position, so that no logit depends on how a text arrives. Example:

    llama-surgery doctor demo/books-26m --adapter adapter --write
    """
    if write and adapter is None:
        raise typer.BadParameter("--write needs --adapter.")
    if adapter is not None:
        check_complete(adapter)
    look_for(model)
    with status("Loading PyTorch and transformers …"):
        import torch

        from llama_surgery.bench.crossover import measure_crossover
        from llama_surgery.cli.common import _device
        from llama_surgery.config import SurgeryConfig
        from llama_surgery.surgery.adapter import read_config, write_config

        config, measured = (SurgeryConfig(), None) if adapter is None else read_config(adapter)
        target = _device(device)
        if dtype is Dtype.auto:
            precision = torch.bfloat16 if target.type == "cuda" else torch.float32
        else:
            precision = getattr(torch, dtype.value)
        shape, told = _patient(model)
    told = {"Machine": _machine(target), **told, **_executor(config, shape, target, precision)}
    if measured is not None:
        told["Loss"] = str(measured)
    if not json:
        for name, value in told.items():
            out.print(f"[bold]{name}:[/] {escape(value)}", soft_wrap=True, highlight=False)
    default = ["2k", "4k", "8k", "16k", "32k"] if target.type == "cuda" else ["1k", "2k", "4k", "8k"]
    until, points = measure_crossover(
        shape,
        config,
        token_counts(length or default),
        density,
        csv,
        seconds=seconds,
        device=target,
        dtype=precision,
    )
    if write and adapter is not None:
        write_config(adapter, dataclasses.replace(config, dense_until=until))
    advice = _advice(until, points)
    if json:
        points_told = [p._asdict() for p in points]
        print_json({**told, "advice": advice, "dense_until": until, "points": points_told})
        return
    columns = ("tokens", "dense path", "operated", "PyTorch's SDPA")
    rows = [
        (f"{p.length:,}", *(f"{ms:.3f}" for ms in (p.dense_ms, p.operated_ms, p.rival_ms))) for p in points
    ]
    out.print(make_table("Attention of one layer, milliseconds", columns, rows))
    out.print(advice, highlight=False, soft_wrap=True)
    if write:
        out.print(f"dense_until = {until} is written into {adapter}.", highlight=False, soft_wrap=True)


def _machine(device: "torch.device") -> str:
    import torch

    told = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    if device.type != "cuda":
        return f"{told}, no GPU is used ({device.type})"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{told}, {torch.cuda.get_device_name(device)} with {memory:.0f} GB"


def _patient(model: str) -> "tuple[Heads, dict[str, str]]":
    """Heads of the model's layers, and what is to be said of it.

    Raises:
        SurgeryError: There is no configuration, or a model of it cannot be operated; the message says why.
    """
    from llama_surgery.bench.crossover import Heads
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
    return Heads(kv_heads * group, kv_heads, dim), {
        "Model": told + ("" if context is None else f"; made for {context:,} tokens")
    }


def _executor(
    config: "SurgeryConfig", shape: "Heads", device: "torch.device", dtype: "torch.dtype"
) -> dict[str, str]:
    """What will execute prompts and decode steps, and why nothing faster."""
    import torch

    from llama_surgery.attention.executor import backend_name
    from llama_surgery.attention.impl.triton import obstacle

    states = torch.empty(1, shape.head_dim, device=device, dtype=dtype)
    told: dict[str, str] = {}
    for phase, tile in (("Prefill", config.tile), ("Decode", 1)):
        name, reason = backend_name(config, states, states, tile), obstacle(config, states, states, tile)
        kernels = "Triton kernels" if name == "triton" else f"plain PyTorch ({name!r})"
        told[phase] = kernels + ("" if reason is None else f", as Triton kernels cannot: {reason}")
    if config.theta_decode == 0:
        told["Decode"] += "; decode steps read everything (theta_decode = 0), so they gain nothing"
    return told


def _advice(until: int, points: "list[Point]") -> str:
    """From where on it pays, or why it does not."""
    from llama_surgery.bench.crossover import crossing

    last = points[-1]
    if until < last.length:
        gain = last.dense_ms / last.operated_ms
        return (
            f"It pays from position {until:,} on (dense_until = {until}); attention of {last.length:,} "
            f"tokens is {gain:.2f} × as fast."
        )
    meets = crossing(points)
    beyond = (
        "longer texts would not change that" if meets is None else f"it may from some {meets:,} tokens on"
    )
    return (
        f"It does not pay up to {last.length:,} tokens, where choosing pages costs more than is saved; by "
        f"the last lengths {beyond} (dense_until = {until})."
    )

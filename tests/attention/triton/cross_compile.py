"""Compiles every kernel, as a call would launch it, for a GPU that need not be there.

    echo cuda:90 --head-dim 128 | python cross_compile.py

Reads configurations, one a line. The launches of real calls are recorded instead of run; for every
configuration one line of JSON is printed per kernel, then an empty line.
"""

import argparse
import dataclasses
import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton import helpers, job, tuning
from llama_surgery.attention.impl.triton.backward import gradients as backward_pass
from llama_surgery.attention.impl.triton.backward import lists as backward_lists
from llama_surgery.attention.impl.triton.decode import cache as decode_cache
from llama_surgery.attention.impl.triton.decode import launch as decode
from llama_surgery.attention.impl.triton.decode import shape as decode_shape
from llama_surgery.attention.impl.triton.decode.tuning import decode_tuning_for
from llama_surgery.attention.impl.triton.gated import launch as gated
from llama_surgery.attention.impl.triton.hopper import attend_kernel as hopper_attend_kernel
from llama_surgery.attention.impl.triton.hopper import launch as hopper
from llama_surgery.attention.impl.triton.layout import launch as layout
from llama_surgery.attention.impl.triton.pieces import Piece, PieceTable
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.select import launch as selection
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.decoding import cache_view
from llama_surgery.topology.layout import Layout, build_layout
from llama_surgery.topology.router import PageRouter

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


#: Arguments of a launch that are not the kernel's.
OPTIONS = ("num_warps", "num_stages", "maxnreg", "allowed_dot_input_precisions")

#: Constants that are mere numbers in a kernel's code, a summand, a divisor, a loop's bound: of launches that
#: differ in them alone the first is compiled.
NUMBERS = {
    "scan_kernel": ("PAGE", "LOG2_PAGE"),
    "score_kernel": ("LOG2_PAGE",),
    "project_kernel": ("NODE",),
}

#: Processors of the GPU that work is split for.
PROCESSORS = 132

#: Kernels by the module that launches them.
KERNELS = {
    prefill: ("attend_kernel",),
    selection: ("scan_kernel",),
    layout: (
        "map_kernel",
        "project_kernel",
        "split_kernel",
        "arrange_kernel",
    ),
    backward_pass: (
        "query_gradient_kernel",
        "near_gradient_kernel",
        "far_gradient_kernel",
    ),
    backward_lists: ("place_kernel", "reader_kernel"),
    gated: ("gated_kernel", "gated_query_kernel", "gated_key_kernel"),
    decode_cache: ("append_kernel",),
    decode: ("score_kernel", "open_kernel", "merge_kernel"),
    hopper_attend_kernel: ("hopper_attend_kernel",),
}


#: The kernels themselves, of which recorders take the places.
ORIGINALS = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}


def parse_target(name: str) -> tuple[GPUTarget, str]:
    """``cuda:90`` or ``hip:gfx942`` to a target and its family in the tuning table."""
    backend, arch = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32), f"sm{arch}"
    return GPUTarget("hip", arch, 64), arch


class Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.kernel, self.target = kernel, target
        self.compiled: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | kwargs
        unspecialised = self.kernel.do_not_specialize or ()
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
            elif isinstance(value, GluonDescriptor):
                block = f"{TYPES[value.base.dtype][1:]}{list(value.block_shape)}"
                signature[name] = f"tensordesc<{block},{value.layout!r}>"
            elif value is None or name in kwargs:
                signature[name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and name not in unspecialised:
                signature[name] = "constexpr"
                constants[(place,)] = value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and name not in unspecialised:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        numbers = NUMBERS.get(self.kernel.__name__, ())
        shapes = {names[k[0]]: v for k, v in constants.items() if names[k[0]] not in numbers}
        key = json.dumps([signature, shapes, options], default=str)
        if key not in self.compiled:
            kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
            source = kind(self.kernel, signature, constants, attributes)
            self.compiled[key] = triton.compile(source, target=self.target, options=options)


def filled_while_read(ttgir: str) -> bool:
    """Does a loop copy into a buffer that it has one of, while an asynchronous product may still read it?

    Triton's pipelining does that for loads whose addresses are loaded too: the product is waited for one step
    late, as if there were two buffers.
    """
    lines = re.sub(r" loc\([^)]*\)", "", ttgir).splitlines()
    buffer: dict[str, str] = {}  # views of buffers that there is one of
    loops: list[tuple[int, set[str], set[str], list[int]]] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        made = re.match(r"\s*(%\w+) = ttg\.(local_alloc : \(\) -> !ttg\.memdesc<1x|memdesc_\w+ (%\w+))", line)
        if made and (made[3] is None or made[3] in buffer):
            buffer[made[1]] = made[1] if made[3] is None else buffer[made[3]]
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append((indent, set(), set(), []))
        elif loops and indent == loops[-1][0] and line.lstrip().startswith("}"):
            _, filled, read, late = loops.pop()
            if filled & read and max(late, default=0) > 0:
                return True
        elif loops:
            names = {buffer[name] for name in re.findall(r"%\w+", line) if name in buffer}
            if "copy_global_to_local" in line:
                loops[-1][1].update(names)
            elif "warp_group_dot_wait" in line:
                loops[-1][3].extend(map(int, re.findall(r"pendings = (\d+)", line)))
            elif "warp_group_dot " in line:
                loops[-1][2].update(names)
    return False


def call_of(config: SurgeryConfig, states: torch.Tensor, **more: Any) -> AttentionCall:
    return AttentionCall(config, "triton", config.tile, states.shape[-1] ** -0.5, **more)


def launch_backward(
    states: torch.Tensor, keys: torch.Tensor, built: Layout, config: SurgeryConfig, extra: dict[str, Any]
) -> None:
    """The backward pass over lists of four pages."""
    streams, heads, length, _ = states.shape
    counts = torch.zeros(streams * heads, length // config.tile, dtype=torch.int32)
    plan = TiledPlan(0, length, config.tile, counts, counts, counts.new_zeros(*counts.shape, 4))
    forward = backward_pass.Forward(call_of(config, states, softcap=extra.get("softcap")), 0, (plan,))
    far, sinks = (keys[:, :1536], keys[:, :1536]), extra.get("sink_logit")
    inputs = (states, keys, keys, *far, sinks, None, None)  # nothing stands in: that is PyTorch's
    passed = backward_pass.States(*inputs, states, torch.zeros(states.shape[:3]))
    backward_pass.gradients(forward, passed, states, None, [True] * 8)


def launch_gated(states: torch.Tensor, keys: torch.Tensor, config: SurgeryConfig) -> None:
    """Biased attention to three chunks, and its gradients."""
    far, rows = keys[:, : 3 * config.chunk_size], states.detach().requires_grad_()
    bias = torch.zeros(*states.shape[:3], 3 * config.pages_per_chunk)
    out, lse = gated.far_field(call_of(config, states), rows, far, far, bias, 0)
    (out.sum() + lse.sum()).backward()


def corrections(kv_heads: int, group: int, head_dim: int) -> PageRouter:
    """Learned corrections of every kind."""
    budgets, weights = torch.zeros(kv_heads, group), torch.zeros(kv_heads, group, head_dim)
    return PageRouter(budgets, weights, weights, torch.zeros(kv_heads, head_dim, head_dim), budgets)


def launch_decode(
    states: torch.Tensor, config: SurgeryConfig, family: str, extra: dict[str, Any], variants: bool
) -> None:
    """Steps on caches for long texts: those that open pages, and those that read everything.

    ``variants`` adds several rows, block tables, learned corrections, larger pages and no summaries.
    """
    streams = states.shape[0]
    tuning = decode_tuning_for(family)
    decode_shape.processors_of = lambda _: PROCESSORS  # type: ignore[assignment]
    learned = corrections(streams, *states.shape[1::2])
    coarse = dataclasses.replace(config, page_size=64)
    bare = dataclasses.replace(coarse, summary="none")
    calls = [(config, 1, False, False, None), (config, 1, False, True, None)]
    if variants:
        calls += [
            (config, 8, True, False, learned),
            (bare, 4, False, False, None),
            (coarse, 1, True, False, None),
        ]
    for rule, rows, paged, whole, router in calls:
        buffers = PageBuffers(rule, streams, states.device)
        buffers.reserve(1 << 16)
        buffers.write(slice(None), 0, states[:, 0], states[:, 0])
        cache = cache_view(buffers, rule, streams, torch.zeros(1, dtype=torch.int32), whole=whole)
        if paged:
            cache = dataclasses.replace(cache, table=torch.zeros(1, cache.chunks, dtype=torch.int32))
        queries, new = states[:, :, :rows], states[:, 0, :rows]
        decode_cache.append_tokens(cache, new, new)
        tally = torch.zeros(2, streams, dtype=torch.int64)
        decode.decode(queries, cache, router=router, tally=tally, advance=not paged, tuning=tuning, **extra)


def compile_all(
    target_name: str,
    head_dim: int,
    dtype: torch.dtype,
    heads: int,
    *,
    wide: bool,
    variants: bool,
) -> list[dict[str, Any]]:
    """Compile what calls launch; returns a row per kernel variant.

    These are the launches of the defaults, and of pages of 128 keys; with ``variants`` also those of learned
    corrections, an engine's pool of blocks and pieces, other pages and no summaries.
    """
    target, family = parse_target(target_name)
    config = SurgeryConfig(theta_decode=0.01)
    recorders = []
    for (module, name), kernel in ORIGINALS.items():
        recorders.append(Recorder(kernel, target))
        setattr(module, name, recorders[-1])
    chosen = tuning.tuning_for(family, head_dim, dtype.itemsize, helpers.exact_products(dtype))
    job.tuning_for = lambda *_: chosen  # type: ignore[assignment]
    backward_pass.family_of = lambda _: family  # type: ignore[assignment]
    hopper.processors_of = lambda _: PROCESSORS  # type: ignore[assignment]
    length = 2048
    states = torch.zeros(8, heads, length, head_dim, dtype=dtype)
    keys = states[:, 0].contiguous()
    built = build_layout(keys[:, :1536], keys[:, :1536], config)
    learned = corrections(8, heads, head_dim)
    layout.build_layout(keys[:, :1536], keys[:, :1536], config, learned)
    extra: dict[str, Any] = {"softcap": 50.0, "sink_logit": torch.zeros(8, heads)} if wide else {}

    def attend(
        rule: SurgeryConfig, rows: int, chunks: Any, router: PageRouter | None = None, **more: Any
    ) -> None:
        call = call_of(rule, states, softcap=extra.get("softcap"), router=router)
        near, more = keys[:, :rows], more | {"sink_logit": extra.get("sink_logit")}
        prefill.attend(call, states[:, :, :rows], near, near, chunks, start=0, **more)

    attend(config, length, built)
    attend(config, 64, None)
    # Larger pages take the most shared memory, and on Hopper the kernel for any GPU. Without matrix units the
    # products of a page are written out one by one, which takes the compiler a minute and more.
    if target.backend == "hip" or not helpers.exact_products(dtype):
        large = dataclasses.replace(config, page_size=128)
        attend(large, length, build_layout(keys[:, :1536], keys[:, :1536], large))
    if variants:
        full, blocks = keys[:, :1536], torch.zeros(3, dtype=torch.int64)
        sinks = torch.zeros(8, dtype=torch.int32)
        features = job.features_of(built, dtype)
        pool = job.PooledLayout(full, full, blocks, 512, features, built.mean_values, sinks)
        pieces = PieceTable([Piece(0, length, 0, 0, 0)], config, config.tile, keys.device)
        attend(config, length, pool, learned, pieces=pieces)
        bare = dataclasses.replace(config, summary="none", page_size=64)
        attend(bare, length, build_layout(keys[:, :1536], keys[:, :1536], bare))
    launch_decode(states, config, family, extra, variants)
    launch_backward(states, keys, built, config, extra)
    launch_gated(states, keys, config)
    rows = []
    for recorder in recorders:
        for kernel in recorder.compiled.values():
            rows.append(
                {
                    "kernel": recorder.kernel.__name__,
                    "target": target_name,
                    "head_dim": head_dim,
                    "dtype": str(dtype),
                    "shared": kernel.metadata.shared,
                    "forms": sorted(kernel.asm),
                    "spills": getattr(kernel, "n_spills", None),
                }
            )
            if target.backend == "cuda":
                rows[-1]["tf32"] = ".tf32" in kernel.asm["ptx"]
                rows[-1]["wgmma"] = "wgmma.mma_async" in kernel.asm["ptx"]
                rows[-1]["filled_while_read"] = filled_while_read(kernel.asm["ttgir"])
    return rows


def parser() -> argparse.ArgumentParser:
    """Of a configuration's line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("target")
    made.add_argument("--head-dim", type=int, default=128)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--wide", action="store_true", help="with softcap and sinks")
    made.add_argument("--tf32", action="store_true", help="float32 products may be in TF32")
    made.add_argument("--variants", action="store_true", help="more than the defaults")
    return made


if __name__ == "__main__":
    for line in sys.stdin:
        given = parser().parse_args(line.split())
        torch.set_float32_matmul_precision("high" if given.tf32 else "highest")
        for row in compile_all(
            given.target,
            given.head_dim,
            getattr(torch, given.dtype),
            given.heads,
            wide=given.wide,
            variants=given.variants,
        ):
            print(json.dumps(row))
        print(flush=True)

"""How far it is from a model's attention to a kernel, and how often it is asked who executes."""

import dataclasses
import importlib.util
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.surgery.tiny import SPARSE, build, tokens

import llama_surgery as surgery
from llama_surgery.attention.impl import gather, triton
from llama_surgery.surgery.compat import CACHE_NAME

PACKAGE = str(Path(surgery.__file__).parent)

#: Kernels of a step; a prompt's are all others but those that lay chunks out.
DECODE = {"append_kernel", "score_kernel", "open_kernel", "merge_kernel"}
PREFILL = {"scan_kernel", "attend_kernel"}
NEEDS_KERNELS = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs triton, and a GPU or its interpreter",
)


def frames() -> int:
    """Calls of this package's functions between a module's ``forward`` and the caller."""
    stack = [(frame.filename, frame.name) for frame in traceback.extract_stack()]
    forward = max(i for i, (file, name) in enumerate(stack) if "modeling_" in file and name == "forward")
    return sum(file.startswith(PACKAGE) for file, _ in stack[forward:])


def calls(backend: str, device: str = "cpu") -> Callable[[], None]:
    """Every time it is called, the next call of a model of one layer: a prompt, then steps."""
    model = build("Llama", num_hidden_layers=1).float().to(device)
    ids = iter(tokens(1, 200).to(device).split([192, 1, 1, 6], 1))
    surgery.operate(model, dataclasses.replace(SPARSE, backend=backend, theta_decode=0.1), routers={})
    cache = surgery.paged_cache(model)

    def call() -> None:
        with torch.no_grad():
            model(next(ids), **{CACHE_NAME: cache})

    return call


def test_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for name in ("near_field", "far_field"):
        plain = getattr(gather, name)

        def counted(*args: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            seen[name] = frames()
            return plain(*args, **options)

        monkeypatch.setattr(gather, name, counted)
    call = calls("gather")
    call()
    assert seen.keys() == {"near_field", "far_field"} and max(seen.values()) <= 5
    seen.clear()
    call()
    assert seen.keys() == {"near_field", "far_field"} and max(seen.values()) <= 4


@NEEDS_KERNELS
def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import KernelInterface

    seen: dict[str, int] = {}
    launch = KernelInterface.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        name = kernel.fn.__name__
        seen[name] = max(seen.get(name, 0), frames())
        return launch(kernel, grid)

    asked, obstacle = [], triton.obstacle

    def told(*given: Any) -> str | None:
        asked.append(given)
        return obstacle(*given)

    monkeypatch.setattr(triton, "obstacle", told)
    monkeypatch.setattr(KernelInterface, "__getitem__", counted)
    call = calls("triton", "cuda" if torch.cuda.is_available() else "cpu")
    call()
    assert {name: count for name, count in seen.items() if name in PREFILL and count > 5} == {}
    assert seen.keys() >= PREFILL
    # For the kind of keys that the cache holds, for tiles of a prompt, and for those of steps: never again.
    assert len(asked) == 2
    seen.clear()
    for _ in range(2):
        call()
    assert seen.keys() == DECODE and max(seen.values()) <= 4
    assert len(asked) == 3


@NEEDS_KERNELS
def test_what_the_host_does_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models wait for it up to some thousand tokens: one launch less is worth more than its kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.jit import KernelInterface

    launched, asked = [], []

    def counted(kernel: Any, grid: Any) -> Callable[..., None]:
        launched.append(kernel.fn.__name__)
        return lambda *args, **options: None

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(str(operation))
            return operation(*args, **(kwargs or {}))

    call = calls("triton", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(KernelInterface, "__getitem__", counted)
    with Operations():
        call()
    levels = (SPARSE.chunk_size // SPARSE.page_size).bit_length() - 1
    assert len(launched) == 2 * levels + 3  # a tree's levels, sorting, choosing, attending
    assert len(asked) <= 180, sorted(asked)

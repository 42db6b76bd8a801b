"""Runs the kernels for Hopper on a CPU: their source, with the parts of Gluon that they use in PyTorch.

Triton interprets its own kernels, but none in Gluon. Here partitions are threads, and mbarriers make them
wait as on the device, so that what a kernel computes shows, and a wait that never ends. Copies and products
are done at once; the latter can be had only from a wait. A buffer of a ring is filled with NaN as soon as
all readers have released it.
"""

import contextlib
import dataclasses
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from llama_surgery.attention.impl.triton import job
from llama_surgery.attention.impl.triton.helpers import ENTRY, FLOOR, LN2, LOG2E
from llama_surgery.attention.impl.triton.hopper import launch as hopper
from llama_surgery.attention.impl.triton.tuning import Tuning

PACKAGE = "llama_surgery.attention.impl.triton"
MODULES = ("hopper.helpers", "hopper.attend_kernel")

#: Seconds after which a wait is taken for one without end.
PATIENCE = 20.0


class Values(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)


class Number(int):
    """A scalar."""

    def to(self, dtype: torch.dtype) -> "Number":
        return self


def _with_type(name: str) -> Callable[..., Any]:
    def call(one: int, other: Any) -> Any:
        found = getattr(int, name)(one, other)
        return Number(found) if isinstance(found, int) else found

    return call


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(Number, _side, _with_type(_side))


def values(tensor: Any) -> Values:
    return torch.as_tensor(tensor).as_subclass(Values)


@dataclasses.dataclass
class Pointer:
    """A tensor's memory from an offset on, which may be many."""

    tensor: torch.Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + more)

    def __sub__(self, less: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset - less)

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def memory(self) -> torch.Tensor:
        return self.tensor.as_strided(
            (self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),), (1,), 0
        )


@dataclasses.dataclass
class Room:
    """Shared memory."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def index(self, place: int) -> "Room":
        return Room(self.tensor[place])

    def reshape(self, shape: list[int]) -> "Room":
        return Room(self.tensor.reshape(shape))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Pieces":
        return Pieces(self.tensor, shape[-2])

    _reinterpret = reinterpret

    def permute(self, order: list[int]) -> "Room":
        return Room(self.tensor.permute(order))

    def load(self, layout: Any) -> Values:
        return values(self.tensor.clone())

    def store(self, stored: torch.Tensor) -> None:
        self.tensor.copy_(stored)


@dataclasses.dataclass
class Pieces:
    """Buffers (stages, 1, keys, channels) in pieces of some keys and 64 channels: a line of memory."""

    tensor: torch.Tensor
    keys: int

    def index(self, place: int) -> Room:
        per, slabs = self.tensor.shape[2] // self.keys, self.tensor.shape[3] // 64
        page, slab, stage = place % per, place // per % slabs, place // per // slabs
        keys = slice(page * self.keys, (page + 1) * self.keys)
        return Room(self.tensor[stage, :, keys, slab * 64 : (slab + 1) * 64])


class Barrier:
    """An mbarrier: a phase is complete when all have arrived and all announced bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.left = self.missing = self.phase = 0
        self.then: Callable[[], object] = lambda: None

    def update(self, arrived: int, missing: int) -> None:
        with self.changed:
            self.left -= arrived
            self.missing += missing
            assert self.left >= 0
            assert self.missing >= 0
            if self.left == self.missing == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.then()
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE)
        assert done, "a wait without end"


class Barriers:
    """Those of a ring's buffers."""

    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, place: int) -> Barrier:
        return self.barriers[place]


@dataclasses.dataclass
class Pending:
    """A product that nobody has waited for."""

    result: torch.Tensor


@dataclasses.dataclass
class Descriptor:
    base: torch.Tensor
    block: tuple[int, ...]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=[1, *self.block])


def fetch(descriptor: Descriptor, place: list[int], full: Barrier, room: Room, pred: bool = True) -> None:
    if not pred:
        return
    block = torch.zeros(1, *descriptor.block, dtype=descriptor.dtype)
    source, target = [], []
    for at, size, length in zip(place, block.shape, descriptor.base.shape, strict=True):
        first, last = max(at, 0), max(min(at + size, length), max(at, 0))
        source.append(slice(first, last))
        target.append(slice(first - at, last - at))
    block[tuple(target)] = descriptor.base[tuple(source)]
    room.store(block)
    full.update(0, -block.numel() * block.element_size())


def product(a: Any, b: Room, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    left = a.tensor if isinstance(a, Room) else a
    before = acc.result if isinstance(acc, Pending) else acc
    assert not isinstance(left, Pending)
    result = left.float() @ b.tensor.float()
    result = result + before if use_acc else result
    assert result.shape == before.shape
    return Pending(values(result)) if is_async else values(result)


def wait_for_products(outstanding: int, products: list[Any]) -> Any:
    results = tuple(product.result for product in products)
    return results if len(results) > 1 else results[0]


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    offset, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
    found = pointer.memory()[offset.where(mask, 0)].where(mask, other)
    return values(found) if found.ndim else Number(found)


def store(pointer: Pointer, stored: Any, mask: Any = True) -> None:
    offset, stored, mask = torch.broadcast_tensors(
        torch.as_tensor(pointer.offset), torch.as_tensor(stored), torch.as_tensor(mask)
    )
    pointer.memory()[offset[mask]] = stored[mask].to(pointer.tensor.dtype)


def elementwise(tensors: Callable[..., Any], numbers: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        if not any(isinstance(x, torch.Tensor) for x in given):
            return numbers(*given)
        return values(tensors(*(torch.as_tensor(x) for x in given)))

    return call


class Launches:
    """Programs and partitions as threads, and what stands for Gluon in them."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.lock = threading.Lock()

    def language(self) -> Any:
        def reduce(name: str) -> Callable[..., Any]:
            def call(x: torch.Tensor, axis: int) -> Any:
                found = getattr(x, name)(axis)
                return values(found) if found.ndim else Number(found)

            return call

        def shared(dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Any:
            if layout == "mbarrier":
                return Barriers(shape[0])
            room = torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)
            return Room(room if value is None else room.copy_(value))

        def nothing(*_: Any, **__: Any) -> None:
            return None

        layouts = (
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "BlockedLayout",
            "SwizzledSharedLayout",
        )
        return SimpleNamespace(
            **dict.fromkeys(layouts, nothing),
            NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
            constexpr=Any, static_range=range,
            float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32, int32=torch.int32,
            int64=torch.int64,
            zeros=lambda shape, dtype, layout: values(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout: values(torch.full(shape, value, dtype=dtype)),
            arange=lambda start, stop, layout: values(torch.arange(start, stop, dtype=torch.int32)),
            convert_layout=lambda x, layout: x,
            where=elementwise(torch.where, lambda c, a, b: a if c else b),
            maximum=elementwise(torch.maximum, max),
            exp2=elementwise(torch.exp2, lambda x: 2.0**x), log2=torch.log2,
            max=reduce("amax"), sum=reduce("sum"),
            load=load, store=store, allocate_shared_memory=shared,
            program_id=lambda axis: Number(self.here.number), num_programs=lambda axis: self.here.programs,
            atomic_add=self.add, warp_specialize=self.specialise,
        )  # fmt: skip

    def add(self, pointer: Pointer, more: int) -> int:
        with self.lock:
            before = Number(pointer.memory()[pointer.offset])
            pointer.memory()[pointer.offset] += more
            return before

    def together(self, calls: list[tuple[int, int, Callable[[], None]]]) -> None:
        """Run calls, each as a program of so many, and raise what the first that fails raises."""
        failed: list[BaseException] = []

        def run(number: int, programs: int, call: Callable[[], None]) -> None:
            self.here.number, self.here.programs = number, programs
            try:
                call()
            except BaseException as problem:
                failed.append(problem)

        threads = [threading.Thread(target=run, args=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def specialise(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(partitions) - 1
        here = self.here.number, self.here.programs
        self.together([(*here, functools.partial(part, *given)) for part, given in partitions])

    def kernel(self, source: Callable[..., None], names: list[str]) -> Any:
        """What launches a kernel."""

        def launch(grid: tuple[int], *given: Any, num_warps: int, **constants: Any) -> None:
            arguments = {
                name: Pointer(value) if isinstance(value, torch.Tensor) else value
                for name, value in (dict(zip(names, given, strict=False)) | constants).items()
            }
            call = functools.partial(source, **arguments)
            self.together([(number, grid[0], call) for number in range(grid[0])])

        return _ByGrid(launch)


@dataclasses.dataclass
class _ByGrid:
    launch: Callable[..., None]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)


def _ring(make: Callable[..., Any]) -> Callable[..., Any]:
    """A ring whose buffers are spoilt once they are free."""

    def call(room: Room, stages: int, readers: int) -> Any:
        made = make(room, stages, readers)

        for stage in range(stages):
            buffer = room.tensor[stage]
            spoilt = torch.nan if buffer.is_floating_point() else -1
            made[2].index(stage).then = functools.partial(buffer.fill_, spoilt)
        return made

    return call


@contextlib.contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch, processors: int = 2) -> Iterator[None]:
    """Take the kernels for Hopper, on this machine's processor, wherever their shapes fit."""
    launches = Launches()
    language = launches.language()
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES]

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def expect(barrier: Barrier, size: int) -> None:
        barrier.update(0, size)
        barrier.update(1, 0)

    def closed(first: int, chunk: int, window: int, dense_until: int) -> int:
        return 0 if first < dense_until else max(first - window, 0) // chunk

    stand_ins = {
        "gl": language, "fetch": fetch, "closed_chunks": closed, "barrier": lambda: None,
        "warpgroup_mma": product, "warpgroup_mma_wait": wait_for_products,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: "mbarrier", init=init, expect=expect,
            arrive=lambda barrier, count: barrier.update(count, 0), wait=Barrier.wait,
        ),
        "BLOCK": 64, "TILE": 64, "ENTRY": ENTRY.value, "FLOOR": FLOOR.value, "LN2": LN2.value,
        "LOG2E": LOG2E.value,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "range", lambda *ends: map(Number, range(*ends)), raising=False)
            for name, own in list(vars(module).items()):
                if name in stand_ins:
                    patch.setattr(module, name, stand_ins[name])
                elif name == "hopper_attend_kernel":
                    patch.setattr(module, name, launches.kernel(own.fn, own.arg_names))
                elif isinstance(own, GluonJITFunction):
                    patch.setattr(module, name, _ring(own.fn) if name == "make_ring" else own.fn)
        patch.setattr(hopper, "_described", lambda states, *block: Descriptor(states, block))
        patch.setattr(hopper, "processors_of", lambda _: processors)
        patch.setattr(job, "tuning_for", lambda *_: Tuning(specialised=True))
        yield

"""Triton's interpreter, without most of what it does again for every call and every sum.

Kernels are interpreted on machines without a GPU, which takes most of the tests' time. Two thirds of that
were the interpreter's own bookkeeping: it replaces Triton's whole language whenever a kernel calls a
function, looks for overflows of integers by way of five other operations of Triton and drops what it found,
derives shapes and types anew for every value, and reduces by a function of the kernel's own one element after
the other. What is replaced here does the same, once. These are
private parts of Triton: where a release has others, ``quicken`` leaves it as it is.
"""

import functools
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Replace parts of the interpreter for the rest of the process."""
    replaced = (
        (interpreter, "_patch_lang", _patched_once),
        (interpreter, "_get_np_dtype", _numpy_types_once),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _checked_in_debugging),
        (TritonSemantic, "broadcast_impl_value", _broadcast_if_needed),
        (interpreter.ReduceOps, "generic_reduce", _reduced_by_slices),
        (core.block_type, "__init__", _types_once),
        (core.tensor, "__init__", _shapes_once),
    )
    if all(name in vars(owner) for owner, name, _ in replaced):
        for owner, name, replace in replaced:
            setattr(owner, name, replace(vars(owner)[name]))


def _patched_once(plain: Any) -> Any:
    """The language stays replaced until the kernel that asked for it ends, also while it calls functions."""
    patched: set[int] = set()
    nothing = interpreter._LangPatchScope()

    @functools.cache
    def languages(fn: Any) -> frozenset[int]:
        return frozenset(id(x) for x in fn.__globals__.values() if x is core or x is interpreter.tl)

    def patch(fn: Any) -> Any:
        missing = languages(fn) - patched
        if patched and not missing:
            return nothing
        scope = plain(fn)
        if not patched:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        patched.update(missing)
        return scope

    return patch


def _checked_in_debugging(plain: Any) -> Any:
    def check(semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        # What is found is an assertion of the device, and these are made in debugging only.
        if semantic.builder.options.debug:
            plain(semantic, lhs, rhs, operation)

    return check


def _broadcast_if_needed(plain: Any) -> Any:
    def broadcast(semantic: Any, lhs: Any, rhs: Any) -> Any:
        # Equal shapes are one object: see ``_shapes_once``.
        return (lhs, rhs) if lhs.shape is rhs.shape else plain(semantic, lhs, rhs)

    return broadcast


def _numpy_types_once(plain: Any) -> Any:
    of_scalar = functools.cache(plain)

    def find(kind: Any) -> Any:
        scalar = kind.scalar
        return plain(scalar) if isinstance(scalar, core.pointer_type) else of_scalar(scalar)

    return find


def _reduced_by_slices(plain: Any) -> Any:
    def reduce(ops: Any, given: tuple[Any, ...]) -> list[Any]:
        if ops.axis is None:
            return plain(ops, given)

        def combine(done: tuple[Any, ...], further: tuple[Any, ...]) -> tuple[Any, ...]:
            found = ops.combine_fn.fn(*done, *further)
            return found if isinstance(found, tuple) else (found,)

        slices = zip(*(np.moveaxis(x.handle.data, ops.axis, 0) for x in given), strict=True)
        tensors = (tuple(map(ops.to_tensor, each, [x.dtype for x in given])) for each in slices)
        results = functools.reduce(combine, tensors)
        if not ops.keep_dims:
            return list(results)
        return [ops.to_tensor(np.expand_dims(x.handle.data, ops.axis), x.dtype) for x in results]

    return reduce


def _types_once(plain: Any) -> Any:
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if isinstance(element_ty, core.pointer_type):
            plain(self, element_ty, shape)
            return
        sizes = shape if isinstance(shape, core.tuple) else core._unwrap_shape(shape)
        key = element_ty, tuple(sizes)
        if key not in known:
            plain(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return init


def _shapes_once(plain: Any) -> Any:
    known: dict[Any, tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in known:
            plain(self, handle, type)
            known[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known[key]

    return init

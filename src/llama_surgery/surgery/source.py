"""What an attention module's own code does, read from its source: what no signature tells."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_LOOPS = ast.For | ast.While | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

#: Names by which modeling files reach the attention function of the model's implementation.
_TABLE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


@dataclasses.dataclass(frozen=True)
class AttentionSource:
    """What the forward pass of an attention module does, helpers that it calls included.

    Attributes:
        calls: How often it calls the attention function: the branch with most calls, twice for a loop.
        own_mask: Is the mask made, or changed, by the module whatever the call?
        own_index: Are keys cached under another index than the module's ``layer_idx``?
    """

    calls: int = 0
    own_mask: bool = False
    own_index: bool = False


@functools.cache
def attention_source(kind: type[nn.Module]) -> AttentionSource | None:
    """Facts about the modules of a class, or None where its source cannot be read or is not understood."""
    try:
        functions = _reachable(kind)
    except (OSError, TypeError, SyntaxError):
        return None
    calls = 0
    own_mask, own_index = False, False
    for function in functions:
        names = _attention_names(function)
        calls += _most_calls(function.body, names)
        for call in _calls(function):
            if _is_attention(call, names):
                own_mask |= _makes_mask(function, call)
            elif isinstance(call.func, ast.Attribute) and call.func.attr == "update" and len(call.args) > 2:
                own_index |= ast.unparse(call.args[2]) != "self.layer_idx"
    if not calls and any(_TABLE in ast.unparse(function) for function in functions):
        return None
    return AttentionSource(calls, own_mask, own_index)


def _reachable(kind: type[nn.Module]) -> list[ast.FunctionDef]:
    """The forward function and what it calls: methods of the module, functions of its file."""
    waiting: list[Callable[..., Any]] = [kind.forward]
    found: dict[Callable[..., Any], ast.FunctionDef] = {}
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if function in found or not inspect.isfunction(function):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            continue
        found[function] = tree
        for call in _calls(tree):
            callee = call.func
            if isinstance(callee, ast.Attribute) and ast.unparse(callee.value) == "self":
                waiting.append(getattr(kind, callee.attr, None))
            elif isinstance(callee, ast.Name) and callee.id != _EAGER:
                other = function.__globals__.get(callee.id)
                if getattr(other, "__module__", None) == function.__module__:
                    waiting.append(other)
    return list(found.values())


def _calls(tree: ast.AST) -> Iterable[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _attention_names(function: ast.FunctionDef) -> set[str]:
    """Names that hold the attention function."""
    names = {_EAGER}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            mentioned = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            if mentioned & {_TABLE, _EAGER} and not (
                isinstance(node.value, ast.Call) and _is_attention(node.value, names)
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _is_attention(call: ast.Call, names: set[str]) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in names
    # ALL_ATTENTION_FUNCTIONS[name](...) and ALL_ATTENTION_FUNCTIONS.get_interface(...)(...), not the look-up.
    return isinstance(call.func, ast.Subscript | ast.Call) and _TABLE in ast.unparse(call.func)


def _most_calls(node: ast.AST | list[ast.stmt], names: set[str]) -> int:
    """Calls of the attention function in the branch that has most of them; a loop counts as two rounds."""
    if isinstance(node, list):
        return sum(_most_calls(part, names) for part in node)
    if isinstance(node, ast.If):
        branches = _most_calls(node.body, names), _most_calls(node.orelse, names)
        return _most_calls(node.test, names) + max(branches)
    if isinstance(node, ast.IfExp):
        return max(_most_calls(node.body, names), _most_calls(node.orelse, names))
    own = int(isinstance(node, ast.Call) and _is_attention(node, names))
    inner = sum(_most_calls(child, names) for child in ast.iter_child_nodes(node))
    return own + (2 * inner if isinstance(node, _LOOPS) else inner)


def _makes_mask(function: ast.FunctionDef, call: ast.Call) -> bool:
    """Is the mask of a call something else than what the function was given, whatever it was given?"""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]
    mask = given[0] if given else call.args[4] if len(call.args) > 4 else None
    if mask is None:
        return True
    # Changes under a condition are those of the class's other layers, or of other inputs: they show in calls.
    values = {
        target.id: node.value
        for node in function.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    parameters = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    while isinstance(mask, ast.Name) and mask.id in values:
        mask = values.pop(mask.id)
    return not (isinstance(mask, ast.Name) and mask.id in parameters)

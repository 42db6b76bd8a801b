"""The picture of rooms in docs/design.md: who imports whom, read from the source."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llama_surgery

ROOT = Path(llama_surgery.__file__).parent
PACKAGE = ROOT.name

#: What each room may import beside itself and the modules beside the rooms (configuration, errors, files).
LOWER = {
    "topology": set(),
    "attention": {"topology"},
    "surgery": {"attention", "topology"},
    "learning": {"attention", "surgery", "topology"},
    "gumbel": {"attention", "learning", "surgery"},
    "serving": {"attention", "surgery", "topology"},
    "evaluation": {"surgery", "topology"},
    "export": {"attention", "evaluation", "surgery", "topology"},
    "report": {"evaluation", "surgery"},
    "cli": {
        "attention",
        "evaluation",
        "export",
        "gumbel",
        "learning",
        "report",
        "serving",
        "surgery",
    },
}

#: What a package offers by name, and what starts the command line: they stand above all rooms.
FRONT = (PACKAGE, f"{PACKAGE}.__main__")

#: Modules that no file below may import.
FOREIGN = {"topology": {"transformers", "triton"}, "attention": {"transformers"}}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in ROOT.rglob("*.py")}


def room_of(module: str) -> str | None:
    """The room of a module; None for the modules beside the rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LOWER else None


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that ``node`` imports, also when a function runs or for types alone; not the version's."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            for alias in found.names:
                inside = f"{found.module}.{alias.name}"
                if inside == f"{PACKAGE}.__version__":
                    continue
                yield inside if inside in FILES else str(found.module)


IMPORTS = {module: set(imported(ast.parse(path.read_text()))) for module, path in FILES.items()}


def test_every_folder_is_a_room_of_the_picture() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    picture = (ROOT.parents[1] / "docs" / "design.md").read_text()
    assert folders == LOWER.keys()
    assert [room for room in LOWER if f"\n      {room}/" not in picture] == []


@pytest.mark.parametrize("room", LOWER)
def test_a_room_imports_what_stands_below_it(room: str) -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if room_of(module) == room
        for other in others & FILES.keys()
        if room_of(other) not in {room, None, *LOWER[room]} or other in FRONT
    ]
    assert wrong == []


def test_rooms_stand_on_each_other() -> None:
    assert [*TopologicalSorter(LOWER).static_order()][-1] == "cli"  # raises CycleError where they do not


def test_modules_beside_the_rooms_import_no_room() -> None:
    wrong = {m: [o for o in others if room_of(o)] for m, others in IMPORTS.items() if room_of(m) is None}
    assert {m: rooms for m, rooms in wrong.items() if rooms and m not in FRONT} == {}


def test_modules_import_each_other_in_one_direction() -> None:
    """No cycle: what is imported inside of functions counts, what is imported for types alone does not."""
    inside = {}
    for module, path in FILES.items():
        tree = _Runtime().visit(ast.parse(path.read_text()))
        inside[module] = set(imported(tree)) & FILES.keys() - {module}
    TopologicalSorter(inside).prepare()  # raises CycleError


class _Runtime(ast.NodeTransformer):
    """Leaves out what is for type checkers alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


@pytest.mark.parametrize("room", FOREIGN)
def test_rooms_leave_libraries_to_others(room: str) -> None:
    found = {m: {o.split(".")[0] for o in IMPORTS[m]} & FOREIGN[room] for m in FILES if room_of(m) == room}
    assert {module: names for module, names in found.items() if names} == {}


def test_executors_do_not_import_each_other() -> None:
    base = f"{PACKAGE}.attention.impl."
    ways = ("gather", "reference", "triton")
    wrong = [
        (module, other)
        for module in FILES
        for other in IMPORTS[module]
        for way in ways
        for another in ways
        if module.startswith(base + way) and other.startswith(base + another) and way != another
    ]
    assert wrong == []

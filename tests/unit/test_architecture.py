"""The layers of the package: an import may only go down, and nothing goes in a circle; names."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import dfq

ROOT = Path(dfq.__file__).parent

# From below. Rooms of one line stand side by side and do not know of each other.
LAYERS = (
    ("errors", "_version", "_moved"),
    ("runtime",),
    ("kernels",),
    ("models",),
    ("graph",),
    ("data",),
    ("demo",),
    ("quantization", "synthesis", "evaluation"),
    ("ptq", "qat", "export"),
    ("recipe",),
    ("mixed_precision",),
    ("runs",),
    ("report", "integrations"),
    ("api",),
    ("",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FAMILIES = ("yolov5", "ultralytics", "torchvision", "mmdet")
MOST_LINES = 400

FILES = {
    ".".join(("dfq", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
    if "snippets" not in file.parts
}


def _package(module: str) -> str:
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


@functools.cache
def _imports(module: str) -> list[tuple[str, bool]]:
    """Modules of dfq that a module imports, and whether it does so when it is imported itself."""
    tree = ast.parse(FILES[module].read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    within = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        at_once = id(node) not in typing | within
        if isinstance(node, ast.Import):
            found += [(alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = _package(module).split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((name if name in FILES else base, at_once))
    return [(name, at_once) for name, at_once in found if name in FILES and name != module]


def _room(module: str) -> str:
    return module.removeprefix("dfq").removeprefix(".").partition(".")[0]


def test_every_room_has_its_layer() -> None:
    assert {_room(module) for module in FILES} == set(LEVEL)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    up = [
        name
        for name, _ in _imports(module)
        if _room(name) != _room(module) and LEVEL[_room(name)] >= LEVEL[_room(module)]
    ]
    # The face names what it gives, and imports it when it is asked for.
    assert module == "dfq" or not up


def test_no_module_imports_itself_in_a_circle() -> None:
    waiting = {module: {n for n, now in _imports(module) if now} for module in FILES}
    while waiting:
        free = {module for module, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"in circles: {sorted(waiting)}"
        waiting = {module: needs for module, needs in waiting.items() if module not in free}


@pytest.mark.parametrize("module", FILES)
def test_modules_are_short(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "module", [name for name in FILES if _room(name) not in ("models", "integrations")]
)
def test_no_algorithm_knows_a_family(module: str) -> None:
    known = [name for name, _ in _imports(module) if set(name.split(".")) & set(FAMILIES)]
    # mmdet's own training is driven from the command line, too.
    allowed = module == "dfq.cli.mmdet_config"
    assert allowed or not known


NAME_NOTHING = frozenset({"found", "one", "each", "given", "own", "chosen"})


def test_names_say_what_they_hold() -> None:
    empty = [
        f"{module}:{node.lineno} {name}"
        for module, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _defined(node)
        if name in NAME_NOTHING
    ]
    assert not empty


def _defined(node: ast.AST) -> list[str]:
    """Names that a variable, a parameter, an attribute, a function or a class is given."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return []


TESTS = Path(__file__).resolve().parents[1]


def test_no_test_imports_another_test() -> None:
    names = {file.stem for file in TESTS.rglob("test_*.py")}
    taken = [
        (file.name, node.module)
        for file in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[-1] in names
    ]
    assert not taken


def test_no_two_test_files_have_one_name() -> None:
    # pytest collects them as modules without packages: the second would not be run.
    names = [file.name for file in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

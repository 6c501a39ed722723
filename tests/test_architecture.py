"""The layers of the package: who may import whom, and who may import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import merge

PACKAGE = Path(merge.__file__).parent
LAYERS = {
    "_version": 0,
    "errors": 0,
    "json_files": 0,
    "background": 0,
    "disclosure": 1,
    "header": 1,
    "family": 1,
    "lora": 1,
    "methods": 1,
    "reader": 2,
    "recipe": 2,
    "sources": 2,
    "writer": 2,
    "plan": 3,
    "engine": 3,
    "records": 4,
    "card": 4,
    "conversion": 4,
    "editor": 4,
    "verify": 5,
    "extract": 5,
    "publication": 5,
    "run": 6,
    "grid": 7,
    "tuning": 7,
    "cli": 8,
    "__main__": 8,
    "__init__": 8,
}
TORCH_USERS = {"engine", "editor", "extract", "verify", "grid"}
PRINTERS = {"cli", "__main__"}


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """Return the module or package of the first level that a file belongs to."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def own_imports(tree: ast.AST) -> set[str]:
    """Return the first-level modules of this package that are imported anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "merge":
                names = [f"merge.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("merge.")}
    return found


def graph() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in module_files():
        if room_of(path) == "__init__":
            continue
        imports = own_imports(ast.parse(path.read_text()))
        edges.setdefault(room_of(path), set()).update(imports - {room_of(path)})
    return edges


def test_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in module_files()} == set(LAYERS)


def test_imports_go_down_or_one_way_inside_a_layer() -> None:
    edges = graph()
    upward = [
        (room, other)
        for room, imports in edges.items()
        for other in imports
        if LAYERS[other] > LAYERS[room]
    ]
    assert upward == []
    both_ways = [
        (room, other)
        for room, imports in edges.items()
        for other in imports
        if room in edges.get(other, set())
    ]
    assert both_ways == []


def test_only_some_modules_import_torch() -> None:
    users = set()
    for path in module_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if any(name.split(".")[0] in ("torch", "diffusers", "transformers") for name in names):
                users.add(room_of(path))
    assert users <= TORCH_USERS


def test_only_the_command_line_prints() -> None:
    printers = set()
    for path in module_files():
        if path.name == "digest_worker.py":
            # A program of its own, whose output is read by a pipe.
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "print" or name.startswith(("click.echo", "sys.stdout", "sys.stderr")):
                    printers.add(room_of(path))
    assert printers <= PRINTERS


def test_no_room_for_leftovers() -> None:
    names = {path.stem for path in module_files()}
    assert not names & {"utils", "helpers", "common", "misc", "util"}


def test_files_stay_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in module_files()}
    assert {name: lines for name, lines in lengths.items() if lines >= 400} == {}


def test_public_names_are_sorted_and_load() -> None:
    assert list(merge.__all__) == sorted(merge.__all__, key=lambda n: (n.islower(), n))
    for name in merge.__all__:
        assert getattr(merge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = merge.nothing


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, merge; heavy = {'torch', 'diffusers', 'transformers', 'omegaconf', "
        "'huggingface_hub', 'numpy', 'click'}; print(sorted(heavy & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == "[]", child.stderr


def test_every_public_function_has_a_docstring() -> None:
    missing = []
    for path in module_files():
        tree = ast.parse(path.read_text())
        nested = _nested(tree)
        for node in ast.walk(tree):
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_"):
                is_nested = isinstance(node, ast.FunctionDef) and node.name in nested
                if not ast.get_docstring(node) and not is_nested:
                    missing.append(f"{path.name}:{node.name}")
    assert missing == []


def _nested(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names |= {
                child.name
                for child in ast.walk(node)
                if isinstance(child, ast.FunctionDef) and child is not node
            }
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            names |= {child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef)}
    return names


def test_every_room_has_its_tests_in_a_folder_of_its_name() -> None:
    tests = Path(__file__).parent
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {path.parent.name for path in tests.glob("*/test_*.py")}


def test_functions_stay_short() -> None:
    long = [
        f"{path.name}:{node.name}"
        for path in module_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno >= 80
    ]
    assert long == []


def test_doors_can_be_counted() -> None:
    """A newcomer finds the room for a line by its name: few rooms, each of one subject."""
    assert len([name for name in LAYERS if not name.startswith("_")]) <= 25

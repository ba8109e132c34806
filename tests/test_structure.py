"""The house: what may import what, without circles, and each class name once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path for path in SRC.rglob("*.py")
}
ROOMS = [
    *("errors", "console", "plots", "storage", "models", "tuner", "adapters", "tasks", "training", "fleet", "runs"),
    *("evaluation", "reproduce", "studio", "demo", "cli"),
]
"""From the ground floor up: a room imports only from those before it."""
ALLOWED = {
    **{room: set(ROOMS[:index]) for index, room in enumerate(ROOMS)},
    # runs beside vLLM, with its older transformers
    "serving": {"errors", "console", "storage", "models", "tuner", "adapters"},
    "tuner": {"errors", "console", "storage", "models"},
    "cli": {*ROOMS, "serving"},
}
MOST_MODULES = 120  # without __init__


def room(module: str) -> str:
    """The package or module right below redpeft that a module belongs to; empty for redpeft itself."""
    return ".".join(module.split(".")[1:2])


def imports(module: str) -> set[str]:
    """The modules of the project that a module imports: also within functions, and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "redpeft":
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {module}


GRAPH = {module: imports(module) for module in MODULES}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in ALLOWED])
def test_imports_go_down(module):
    allowed = ALLOWED[room(module)] | {room(module)}
    # the public names of redpeft are the tuner's
    upwards = {name for name in GRAPH[module] if (room(name) or "tuner") not in {*allowed, "__init__"}}
    assert not upwards, f"{module} imports from rooms above its own"


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES} - ALLOWED.keys() == {"", "__main__", "import_hook"}


def test_there_is_no_circle():
    left = {module: names - {"redpeft"} for module, names in GRAPH.items() if module != "redpeft"}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "these modules import each other, or depend on some that do"


def test_each_class_name_stands_once():
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in MODULES.values())
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_each_file_name_stands_once():
    names = Counter(path.name for path in MODULES.values() if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_house_stays_small():
    assert sum(path.name != "__init__.py" for path in MODULES.values()) <= MOST_MODULES


def test_contributing_shows_every_room_and_files_that_exist():
    root = SRC.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `([\w/.]+)`", text, re.M)}
    assert ALLOWED.keys() <= shown
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml))`", text):
        assert (root / path).exists() or (SRC / "redpeft" / path).exists(), path

"""constraints/: the pinned versions are those of today's requirements. `make lock` mends what fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / "constraints" / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("name", "extras"), [("tests", [*EXTRAS]), ("oldest", ["trl", "bnb"]), ("serving", ["gguf"])], ids=str
)
def test_what_is_pinned_is_what_is_required(name, extras):
    pinned: dict[str, list[Requirement]] = {}  # several of one package: one for each range of Python versions
    for pin in requirements(f"{name}.txt"):
        pinned.setdefault(canonicalize_name(pin.name), []).append(pin)
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    for requirement in [*map(Requirement, lines), *requirements(f"{name}.in")]:
        if requirement.name == PROJECT["name"]:
            continue
        pins = pinned.get(canonicalize_name(requirement.name), [])
        assert pins, f"constraints/{name}.txt does not pin {requirement}: run make lock"
        for pin in pins:
            [version] = [each.version for each in pin.specifier]
            assert version in requirement.specifier, f"constraints/{name}.txt has {pin}, not {requirement}: make lock"


@pytest.mark.parametrize("name", ["tests", "oldest", "serving"])
def test_pins_are_plain_versions_of_any_registry(name):
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    odd = [line for line in lines if not re.match(r"#|[\w.-]+==[\w.]+( ; .+)?$", line) or "://" in line]
    assert not odd

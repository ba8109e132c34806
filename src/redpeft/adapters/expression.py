"""The language of `redpeft compose`, read and computed in one pass.

sequence   sum >> sum >> ...       one after another: the left one acts first
sum        term + term + ...       the weighted sum of the differences from the identity
term       thing or thing:weight   the weight is 1 where none is given
thing      a folder, "a folder", (sequence), inverse(sequence), scale(sequence), bias(sequence),
           layers(sequence, 0-5, 11) or trim(sequence, 80%)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from redpeft.adapters import compose as functions
from redpeft.adapters.files import Adapter, read_adapter, write_adapter
from redpeft.errors import UserError
from redpeft.storage import TASK, find_adapter, find_run
from redpeft.tuner.compose import combine_configs
from redpeft.tuner.heads import same_tensors

_TOKEN = re.compile(r"""\s*("[^"]*"|'[^']*'|>>|[+:(),]|[^\s"'+:(),>]+)""")
_Part = TypeVar("_Part")


class Composition(NamedTuple):
    """What was made, and whose head it has, in words; None without a head."""

    adapter: Adapter
    head: str | None


def compose(expression: str, out: str | Path, head: str | Path | None = None) -> Composition:
    """Write the adapter that `expression` says into the folder `out`.

    Names in it are adapter folders or run folders. `head` is such a folder too, whose `modules_to_save` the result
    gets. The arithmetic is fp64, rounded once. Raises `UserError` for an expression that cannot be read, for heads of
    runs with different labels, and as `read_adapter`, the functions of `redpeft.adapters.compose` and `write_adapter`
    do; nothing is written then.
    """
    reader = _Reader(expression, with_heads=head is None)
    result = reader.read()
    leaves = list(reader.leaves.values())
    if head is not None:
        result = functions.take_head(result, _read(str(head), leaves))
    config = combine_configs([leaf.config for leaf in leaves], result.edits.keys())
    result = replace(result, folder=Path(out), config=result.config | config)
    whose = str(head) if head and result.head else _whose_head(result, reader.leaves)
    write_adapter(result)
    _copy_task([str(head)] if head else [*reader.leaves], Path(out))
    return Composition(result, whose)


def _whose_head(result: Adapter, leaves: Mapping[str, Adapter]) -> str | None:
    """Of those in the expression. UserError where they bring heads whose labels differ: equal shapes tell nothing."""
    owners = [name for name, leaf in leaves.items() if leaf.head]
    labels = {name: names for name in owners if (names := _labels(name))}
    if other := next((name for name in labels if labels[name] != labels[next(iter(labels))]), None):
        raise UserError(
            f"{next(iter(labels))} and {other} bring heads (modules_to_save) of different labels; say whose head to "
            "keep: --head on the command line, head=... in Python"
        )
    if not result.head:
        return None
    same = [name for name in owners if same_tensors(result.head, leaves[name].head)]
    return same[0] if same else f"the average of {' and '.join(owners)}, by their weights"


def _copy_task(names: Sequence[str], out: Path) -> None:
    """What the first run with one was trained for, so that `redpeft predict` and `evaluate` know it of the result."""
    tasks = (find_run(Path(name).expanduser()) / TASK for name in names)
    if task := next((path for path in tasks if path.is_file()), None):
        shutil.copyfile(task, out / TASK)


def _labels(name: str) -> list[str] | None:
    """The labels of a run in the order of its head; None where the folder does not tell."""
    task = find_run(Path(name).expanduser()) / TASK
    return json.loads(task.read_text(encoding="utf-8")).get("label_names") if task.is_file() else None


def _read(name: str, others: Sequence[Adapter]) -> Adapter:
    """An adapter of the same base as the others, with the full names of its sites.

    The base gets the name that the first one has for it: from here on nothing can be compared but names."""
    adapter = read_adapter(find_adapter(Path(name).expanduser()))
    functions.check_same_base([*others[:1], adapter])
    first = others[0] if others else adapter
    config = {"base_model_name_or_path": first.config.get("base_model_name_or_path")}
    config |= {"target_modules": list(adapter.edits)}
    return replace(adapter, config=adapter.config | config)


class _Reader:
    """Reads an expression from left to right: a method for each rule of the language, which returns its adapter."""

    def __init__(self, expression: str, with_heads: bool) -> None:
        self.expression = expression
        self.with_heads = with_heads
        self.leaves: dict[str, Adapter] = {}
        self.tokens: list[tuple[str, int]] = []
        position = 0
        while rest := expression[position:].lstrip():
            found = _TOKEN.match(expression, position)
            if not found:
                raise self._error(f"{rest[0]} is not understood", len(expression) - len(rest))
            self.tokens.append((found[1], found.start(1)))
            position = found.end()

    def read(self) -> Adapter:
        result = self._sequence()
        if self.tokens:
            raise self._error(f"{self.tokens[0][0]} is not expected", self.tokens[0][1])
        return result

    def _sequence(self) -> Adapter:
        steps = self._separated(">>", self._sum)
        return steps[0] if len(steps) == 1 else functions.sequence(steps)

    def _sum(self) -> Adapter:
        terms, weights = zip(*self._separated("+", self._term), strict=True)
        return functions.weighted_sum(terms, weights)

    def _term(self) -> tuple[Adapter, float]:
        thing = self._thing()
        if not self._next_is(":"):
            return thing, 1.0
        weight, position = self._take("a weight")
        if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", weight):
            raise self._error(f"{weight} is no weight (a number, as 0.7 or -1)", position)
        return thing, float(weight)

    def _thing(self) -> Adapter:
        name, position = self._take("an adapter folder")
        if name == "(":
            inside = self._sequence()
        elif name in (">>", "+", ":", ")", ","):
            raise self._error(f"an adapter folder is missing before {name}", position)
        elif self._next_is("("):
            if name not in _FUNCTIONS:
                raise self._error(f"there is no function {name}; there are {', '.join(_FUNCTIONS)}", position)
            inside = self._sequence()
            inside = _FUNCTIONS[name](inside, *self._options())
        else:
            return self._leaf(name.strip("\"'"))
        if not self._next_is(")"):
            raise self._error("a ) is missing", self.tokens[0][1] if self.tokens else len(self.expression))
        return inside

    def _leaf(self, name: str) -> Adapter:
        if name not in self.leaves:
            self.leaves[name] = _read(name, list(self.leaves.values()))
        return self.leaves[name] if self.with_heads else replace(self.leaves[name], head={})

    def _options(self) -> list[str]:
        options = []
        while self._next_is(","):
            options.append(self._take("an option")[0])
        return options

    def _separated(self, operator: str, rule: Callable[[], _Part]) -> list[_Part]:
        parts = [rule()]
        while self._next_is(operator):
            parts.append(rule())
        return parts

    def _next_is(self, token: str) -> bool:
        """Step over this token if it comes next."""
        found = bool(self.tokens) and self.tokens[0][0] == token
        if found:
            self.tokens.pop(0)
        return found

    def _take(self, what: str) -> tuple[str, int]:
        if not self.tokens:
            raise self._error(f"{what} is missing", len(self.expression))
        return self.tokens.pop(0)

    def _error(self, problem: str, position: int) -> UserError:
        return UserError(f"cannot read {self.expression!r} at character {position + 1}: {problem}")


def _layers(adapter: Adapter, *options: str) -> Adapter:
    ranges = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", option) for option in options]
    if not ranges or not all(ranges):
        raise UserError(
            f"layers wants numbers of layers, as layers(x, 0-5, 11), not {', '.join(options) or 'nothing'}"
        )
    bounds = [sorted((int(found[1]), int(found[2] or found[1]))) for found in ranges if found]
    return functions.keep_layers(adapter, [layer for first, last in bounds for layer in range(first, last + 1)])


def _trim(adapter: Adapter, *options: str) -> Adapter:
    percent = re.fullmatch(r"(\d+\.?\d*)%", options[0]) if len(options) == 1 else None
    if not percent:
        raise UserError(f"trim wants one percentage, as trim(x, 80%), not {', '.join(options) or 'nothing'}")
    return functions.trim(adapter, float(percent[1]) / 100)


def _plain(function: Callable[[Adapter], Adapter]) -> Callable[..., Adapter]:
    def call(adapter: Adapter, *options: str) -> Adapter:
        if options:
            raise UserError(f"{', '.join(options)} is not expected: inverse, scale and bias take an adapter alone")
        return function(adapter)

    return call


_FUNCTIONS: dict[str, Callable[..., Adapter]] = {
    "inverse": _plain(functions.inverse),
    "scale": _plain(functions.keep_scale),
    "bias": _plain(functions.keep_bias),
    "layers": _layers,
    "trim": _trim,
}

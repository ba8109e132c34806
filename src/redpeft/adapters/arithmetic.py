"""Arithmetic on adapters: functions that make one adapter from others, and `compose`, which evaluates an expression.

A site's edit is the affine map `h' = scale * h + bias` of each channel, with the bias in the output's own size:

    sequence([a, b])              a, then b              scale = sb * sa                      bias = sb * ba + bb
    weighted_sum([a, b], [u, v])  of what they change    scale = 1 + u (sa - 1) + v (sb - 1)  bias = u ba + v bb
    inverse(a)                    undoes a after it      scale = 1 / sa                       bias = -ba / sa
    keep_scale(a), keep_bias(a)   one of its vectors     bias = 0                             scale = 1
    keep_layers(a, [0, 1])        some layers' sites
    trim(a, 0.8)                  without the smallest 80 % of the scales and of the biases

`weighted_sum` is the average where the weights sum to 1. With one adapter the weight is its strength: 0.5 half of it,
-1 its negation. At a site that an adapter does not edit, it counts as the identity.

Adapters of different base models are refused. The result has the configuration and the units of the first adapter that
has them, and the head that `tuner.heads.combine_heads` gives.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import CHAT_TEMPLATE_FILE

from redpeft.adapters.folder import Adapter, EffectiveEdit, read_adapter, write_adapter
from redpeft.console import log_main
from redpeft.errors import UserError, shorten_list
from redpeft.models import fingerprint_difference, read_chat_template
from redpeft.storage import TASK, find_adapter, find_run, read_json, write_atomically
from redpeft.tuner import compose as edit_arithmetic
from redpeft.tuner.heads import Head, combine_heads, same_tensors

MOST_LAYERS = 10_000


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of the adapters' differences from the identity: average, interpolation, strength, negation.

    Heads are averaged where their weights sum to 1. `UserError`: adapters of different bases, heads that differ.
    """
    return _combine(adapters, weights, edit_arithmetic.weighted_sum, averaging=True)


def sequence(adapters: Sequence[Adapter]) -> Adapter:
    """The adapters one after another at each site, the first one first: what PEFT does with several active ones.

    `UserError`: adapters of different bases, heads that differ.
    """
    return _combine(adapters, [1.0] * len(adapters), edit_arithmetic.sequence, averaging=False)


def inverse(adapter: Adapter) -> Adapter:
    """The adapter that undoes `adapter` when it acts after it. `UserError` names the sites where a scale is 0."""
    zero = [site for site, edit in adapter.edits.items() if bool((edit.scale == 0).any())]
    if zero:
        raise UserError(
            f"{adapter.folder} has no inverse: a scale is 0 at {shorten_list(zero)}. Its negation, a weight of -1, "
            "exists"
        )
    return _each(adapter, lambda edit: _edit(edit_arithmetic.inverse(_difference(edit))))


def keep_scale(adapter: Adapter) -> Adapter:
    """The scales alone: every bias 0."""
    return _each(adapter, lambda edit: EffectiveEdit(edit.scale, torch.zeros_like(edit.bias)))


def keep_bias(adapter: Adapter) -> Adapter:
    """The biases alone: every scale 1."""
    return _each(adapter, lambda edit: EffectiveEdit(torch.ones_like(edit.scale), edit.bias))


def keep_layers(adapter: Adapter, layers: Iterable[int]) -> Adapter:
    """The sites of some layers alone; a site's layer is the first number in its name.

    `UserError`: a layer in which the adapter has no site.
    """
    of_site = {site: int(found[1]) for site in adapter.edits if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", site))}
    wanted = set(layers)
    if missing := wanted - set(of_site.values()):
        there = ", ".join(map(str, sorted(set(of_site.values())))) or "none, as no site's name has a number"
        raise UserError(f"{adapter.folder} edits nothing in layer {min(missing)}; its layers are {there}")
    return _derived([adapter], {site: edit for site, edit in adapter.edits.items() if of_site.get(site) in wanted})


def trim(adapter: Adapter, share: float) -> Adapter:
    """Set the smallest entries to the identity: of the scales this share (0 to 1), and of the biases this share.

    Over all sites together, scales by |scale - 1| and biases by |bias| / unit, so that a site whose output is large
    has no larger say. `UserError`: a share out of range.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share to trim is from 0 to 1, not {share:g}")
    scales = _largest({site: edit.scale - 1 for site, edit in adapter.edits.items()}, share)
    biases = _largest({site: edit.bias / adapter.units[site] for site, edit in adapter.edits.items()}, share)
    edits = {
        site: EffectiveEdit(torch.where(scales[site], edit.scale, 1), torch.where(biases[site], edit.bias, 0))
        for site, edit in adapter.edits.items()
    }
    return _derived([adapter], edits)


def take_head(adapter: Adapter, owner: Adapter) -> Adapter:
    """`adapter` with the head (`modules_to_save`) of `owner`. `UserError`: adapters of different bases."""
    check_same_base([adapter, owner])
    return _with_head(adapter, owner, owner.head)


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise `UserError` where adapters belong to different base models, as far as their folders tell.

    Widths must agree. Fingerprints decide between adapters of the same sites; where they cannot (other sites, or none
    recorded), the names of the base models do.
    """
    first, *others = adapters
    for other in others:
        if reason := _other_base(first, other):
            raise UserError(f"{first.folder} and {other.folder} are for different base models: {reason}")


def _other_base(one: Adapter, other: Adapter) -> str | None:
    for site in [site for site in one.edits if site in other.edits]:
        widths = one.edits[site].scale.numel(), other.edits[site].scale.numel()
        if widths[0] != widths[1]:
            return f"the output of {site} has width {widths[0]} in one and {widths[1]} in the other"
    prints = one.config.get("base_fingerprint"), other.config.get("base_fingerprint")
    if all(prints) and one.edits.keys() == other.edits.keys():
        return fingerprint_difference(*prints)
    names = [adapter.config.get("base_model_name_or_path") for adapter in (one, other)]
    if all(names) and names[0] != names[1]:
        return (
            f"one names {names[0]}, the other {names[1]}, and their fingerprints cannot be compared; if these are the "
            "same model, write the same base_model_name_or_path into both adapter_config.json"
        )
    return None


def _combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: edit_arithmetic.Combination, *, averaging: bool
) -> Adapter:
    check_same_base(adapters)
    edits = {}
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.edits):
        pairs = zip(adapters, weights, strict=True)
        there = [(_difference(adapter.edits[site]), weight) for adapter, weight in pairs if site in adapter.edits]
        edits[site] = _edit(combination(*zip(*there, strict=True)))
    names, heads = [str(adapter.folder) for adapter in adapters], [adapter.head for adapter in adapters]
    head = combine_heads(names, heads, weights if averaging else None)
    owner = next((adapter for adapter in adapters if adapter.head), adapters[0])
    return _with_head(_derived(adapters, edits), owner, head)


def _difference(edit: EffectiveEdit) -> edit_arithmetic.Difference:
    return edit.scale - 1, edit.bias


def _edit(difference: edit_arithmetic.Difference) -> EffectiveEdit:
    return EffectiveEdit(1 + difference[0], difference[1])


def _with_head(adapter: Adapter, owner: Adapter, head: Head) -> Adapter:
    config = {name: owner.config.get(name) for name in ("modules_to_save", "task_type")}
    return replace(adapter, config=adapter.config | config, head=dict(head))


def _each(adapter: Adapter, function: Callable[[EffectiveEdit], EffectiveEdit]) -> Adapter:
    return _derived([adapter], {site: function(edit) for site, edit in adapter.edits.items()})


def _derived(adapters: Sequence[Adapter], edits: Mapping[str, EffectiveEdit]) -> Adapter:
    """The first adapter with other edits, and what its configuration then says."""
    configs = [{**adapter.config, "target_modules": list(adapter.edits)} for adapter in adapters]
    config = adapters[0].config | edit_arithmetic.combine_configs(configs, edits.keys())
    units = dict.fromkeys(edits, 1.0)
    if config["unit_measured"] or config.get("unit") != "auto":
        units = {site: next(a.units[site] for a in adapters if site in a.units) for site in edits}
    return replace(adapters[0], config=config, edits=dict(edits), units=units)


def _largest(values: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Masks of the values that stay when the smallest of all are left out: round(share * their number)."""
    sizes = torch.cat(list(values.values())).abs()
    stays = torch.ones_like(sizes, dtype=torch.bool)
    stays[sizes.argsort(stable=True)[: round(share * len(sizes))]] = False
    return dict(zip(values, stays.split([len(value) for value in values.values()]), strict=True))


# --- expressions -----------------------------------------------------------------------------------------------------


class Composition(NamedTuple):
    """What was made, and whose head it has, as text; None without a head."""

    adapter: Adapter
    head: str | None


def compose(expression: str, out: str | Path, head: str | Path | None = None) -> Composition:
    """Evaluate an expression and write the adapter that it gives into the folder `out`.

    An expression has Python's syntax. Operators, from the loosest to the tightest:

        a >> b             b after a (`sequence`)
        a + b, a - b       the weighted sum
        0.7 * a, -a        a with a weight
        "runs/formal"      the adapter in a folder, or in a run's folder
        inverse(a), scale(a), bias(a), layers(a, 0-5, 11), trim(a, 0.8)

    `head`: the folder of the adapter whose `modules_to_save` the result gets. The arithmetic is fp64, rounded once.
    Raises `UserError` for an expression that cannot be read, for heads of runs with different labels, and as
    `read_adapter`, the functions of this module and `write_adapter` do; nothing is written then.
    """
    evaluator = _Evaluator(expression, with_heads=head is None)
    result = evaluator.evaluate()
    adapters = evaluator.adapters
    if head is not None:
        result = take_head(result, _read(str(head), list(adapters.values())))
    configs = [adapter.config for adapter in adapters.values()]
    config = edit_arithmetic.combine_configs(configs, result.edits.keys())
    result = replace(result, folder=Path(out), config=result.config | config)
    whose = str(head) if head and result.head else _whose_head(result, adapters)
    write_adapter(result)
    _copy_task([str(head)] if head else [*adapters], Path(out))
    _copy_chat_template(list(adapters.values()), Path(out))
    return Composition(result, whose)


_USAGE = {
    "inverse": "inverse(a)",
    "scale": "scale(a)",
    "bias": "bias(a)",
    "layers": "layers(a, 0-5, 11)",
    "trim": "trim(a, 0.8)",
}


class _Evaluator:
    """Evaluates an expression. `adapters`: those that it names, by their names in it."""

    def __init__(self, expression: str, with_heads: bool) -> None:
        self.expression = expression.strip()
        self.with_heads = with_heads
        self.adapters: dict[str, Adapter] = {}

    def evaluate(self) -> Adapter:
        try:
            return self._adapter(ast.parse(self.expression, mode="eval").body)
        except SyntaxError as error:
            problem = f'{error.msg}; an expression is written as 0.7 * "runs/a" + 0.3 * "runs/b"'
            raise self._error(problem, error.offset or len(self.expression) + 1) from error
        except (RecursionError, MemoryError, OverflowError) as error:
            raise self._error("it is nested too deeply, or a number in it is too large", 1) from error

    def _adapter(self, node: ast.expr) -> Adapter:
        match node:
            case ast.Constant(value=str(name)):
                if name not in self.adapters:
                    self.adapters[name] = _read(name, list(self.adapters.values()))
                return self.adapters[name] if self.with_heads else replace(self.adapters[name], head={})
            case ast.BinOp(op=ast.RShift()):
                return sequence([self._adapter(step) for step in self._steps(node)])
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult()) | ast.UnaryOp(op=ast.USub()):
                terms, weights = zip(*self._terms(node, 1.0), strict=True)
                return weighted_sum(terms, weights)
            case ast.Call(func=ast.Name(id="inverse"), args=[inside], keywords=[]):
                return inverse(self._adapter(inside))
            case ast.Call(func=ast.Name(id="scale"), args=[inside], keywords=[]):
                return keep_scale(self._adapter(inside))
            case ast.Call(func=ast.Name(id="bias"), args=[inside], keywords=[]):
                return keep_bias(self._adapter(inside))
            case ast.Call(func=ast.Name(id="layers"), args=[inside, first, *others], keywords=[]):
                ranges = [self._layers(option) for option in (first, *others)]
                return keep_layers(self._adapter(inside), chain.from_iterable(ranges))
            case ast.Call(func=ast.Name(id="trim"), args=[inside, share], keywords=[]):
                return trim(self._adapter(inside), self._number(share))
            case ast.Call(func=ast.Name(id=name)):
                known = f"there is no function {name}; there are {', '.join(_USAGE)}"
                raise self._error(f"write {_USAGE[name]}" if name in _USAGE else known, node)
        raise self._error('expected a folder in quotes, a sum, a product or a function, as 0.7 * "runs/a"', node)

    def _steps(self, node: ast.expr) -> list[ast.expr]:
        match node:
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                return [*self._steps(left), *self._steps(right)]
        return [node]

    def _terms(self, node: ast.expr, weight: float) -> list[tuple[Adapter, float]]:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [*self._terms(left, weight), *self._terms(right, weight)]
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return [*self._terms(left, weight), *self._terms(right, -weight)]
            case ast.BinOp(left=number, op=ast.Mult(), right=right):
                return self._terms(right, self._number(number) * weight)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._terms(operand, -weight)
        return [(self._adapter(node), weight)]

    def _number(self, node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
        raise self._error(f"expected a number, as 0.7, not {ast.unparse(node)}", node)

    def _layers(self, node: ast.expr) -> range:
        """Of `11`, or of `0-5`, both ends included."""
        match node:
            case ast.Constant(value=int(first)) if first < MOST_LAYERS:
                return range(first, first + 1)
            case ast.BinOp(left=ast.Constant(value=int(first)), op=ast.Sub(), right=ast.Constant(value=int(last))) if (
                last < MOST_LAYERS
            ):
                return range(first, last + 1)
        raise self._error(f"expected a layer, as 11, or a range of layers, as 0-5, not {ast.unparse(node)}", node)

    def _error(self, problem: str, where: ast.expr | int) -> UserError:
        position = where if isinstance(where, int) else where.col_offset + 1
        return UserError(f"cannot read {self.expression!r} at character {position}: {problem}")


def _read(name: str, others: Sequence[Adapter]) -> Adapter:
    """An adapter of the same base as the others, with the full names of its sites.

    Its base gets the first adapter's name for it: results of functions are compared by this name only.
    """
    adapter = read_adapter(find_adapter(Path(name).expanduser()))
    check_same_base([*others[:1], adapter])
    first = others[0] if others else adapter
    config = {"base_model_name_or_path": first.config.get("base_model_name_or_path")}
    config |= {"target_modules": list(adapter.edits)}
    return replace(adapter, config=adapter.config | config)


def _whose_head(result: Adapter, adapters: Mapping[str, Adapter]) -> str | None:
    """Which adapters the head of the result comes from, as text. `UserError`: their heads have different labels, which
    equal shapes do not show."""
    owners = [name for name, adapter in adapters.items() if adapter.head]
    labels = {name: names for name in owners if (names := _labels(name))}
    if other := next((name for name in labels if labels[name] != labels[next(iter(labels))]), None):
        raise UserError(
            f"{next(iter(labels))} and {other} bring heads (modules_to_save) of different labels; say whose head to "
            "keep: --head on the command line, head=... in Python"
        )
    if not result.head:
        return None
    same = [name for name in owners if same_tensors(result.head, adapters[name].head)]
    return same[0] if same else f"the average of {' and '.join(owners)}, by their weights"


def _copy_task(names: Sequence[str], out: Path) -> None:
    """Copy the first task.json of these runs, so that `redpeft predict` and `evaluate` know the task of the result."""
    tasks = (find_run(Path(name).expanduser()) / TASK for name in names)
    if task := next((path for path in tasks if path.is_file()), None):
        shutil.copyfile(task, out / TASK)


def _copy_chat_template(adapters: Sequence[Adapter], out: Path) -> None:
    """Copy the chat template that all of these adapters have; say so if they have different ones."""
    templates = {read_chat_template(adapter.folder) for adapter in adapters}
    if len(templates) > 1:
        log_main("the adapters were trained with different chat templates: the result has the base model's")
    elif template := templates.pop():
        write_atomically(out / CHAT_TEMPLATE_FILE, template)


def _labels(name: str) -> list[str] | None:
    """The labels of a run in the order of its head; None where the folder does not say."""
    task = find_run(Path(name).expanduser()) / TASK
    return read_json(task).get("label_names") if task.is_file() else None

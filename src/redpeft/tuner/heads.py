"""Heads: the modules that adapters train in full and save beside their edits (`modules_to_save`).

PEFT keeps an adapter's copy of each beside the base's own, in a `ModulesToSaveWrapper`. Two copies do not add up, as
two edits do: one of them acts, or their average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils._pytree import tree_map

from redpeft.errors import UserError
from redpeft.tuner.mixed import BASE, MixedBatch

Head = Mapping[str, torch.Tensor]  # the tensors of an adapter's copies


def wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The modules to save, with all adapters' copies, by their names in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def head_of(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's copies of the modules to save."""
    return {
        f"{name}.{key}": tensor
        for name, wrapper in wrappers(model).items()
        if adapter in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[adapter].state_dict().items()
    }


def common_heads(model: nn.Module, adapters: Sequence[str]) -> dict[str, nn.Module]:
    """By the names of the modules to save: the copy that these adapters bring, or the base's own. Raises `UserError`
    where they bring different ones."""
    found = {}
    for module, wrapper in wrappers(model).items():
        copies = wrapper.modules_to_save
        owners = [name for name in dict.fromkeys(adapters) if name in copies]
        combine_heads(owners, [copies[name].state_dict() for name in owners], None)
        found[module] = copies[owners[0]] if owners else wrapper.original_module
    return found


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into a model by their names."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def combine_heads(names: Sequence[str], heads: Sequence[Head], weights: Sequence[float] | None) -> Head:
    """The head (`modules_to_save`) of a composition, from those of its adapters: {} for an adapter without one.

    A head is no difference from an identity, so it is kept where just one comes, or all that come are equal. Several
    are averaged where their weights sum to 1 and they have the same keys and shapes. `weights` is None where an
    average has no meaning (a sequence). `UserError` in any other case.
    """
    owners = [index for index, head in enumerate(heads) if head]
    brought = [heads[index] for index in owners]
    if all(same_tensors(brought[0], head) for head in brought):
        return brought[0] if brought else {}
    said = f"{' and '.join(dict.fromkeys(names[index] for index in owners))} bring different heads (modules_to_save)"
    choose = "say whose head to keep: --head on the command line, head=... in Python"
    if weights is None:
        raise UserError(f"{said}, and heads cannot act one after another; {choose}")
    if any(_shapes(head) != _shapes(brought[0]) for head in brought):
        raise UserError(f"{said}, of other names or shapes; {choose}")
    used = [weights[index] for index in owners]
    if not math.isclose(math.fsum(used), 1):
        raise UserError(f"{said}, and their weights sum to {math.fsum(used):g}, not to 1; {choose}")
    return {key: _average([head[key] for head in brought], used) for key in brought[0]}


def _average(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    pairs = zip(tensors, weights, strict=True)
    return torch.stack([weight * tensor.double() for tensor, weight in pairs]).sum(0).to(tensors[0].dtype)


def _shapes(head: Head) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in head.items()}


def same_tensors(left: Head, right: Head) -> bool:
    """Whether two heads have the same names, shapes and values."""
    return _shapes(left) == _shapes(right) and all(torch.equal(left[key], right[key]) for key in left)


@torch.compiler.disable
def run_by_adapter(modules: Mapping[str, nn.Module], batch: MixedBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run each sequence through its adapter's copy of a module (`modules_to_save`, such as a head).

    The first tensor among the arguments is (batch, ...), as others may be; others go to each copy as they are. The
    outputs are put back into its order. An adapter without a copy uses the base's.
    """
    hidden = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
    slots = batch.index.rows(hidden.shape[0], torch.device("cpu"))
    parts, order = [], []
    for slot in slots.unique().tolist():
        rows = (slots == slot).nonzero().flatten()
        own_args, own_kwargs = tree_map(partial(_rows_of, rows, len(slots)), (args, kwargs))
        parts.append(modules.get(batch.adapters[slot], modules[BASE])(*own_args, **own_kwargs))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _rows_of(rows: torch.Tensor, count: int, value: Any) -> Any:
    """These rows of a tensor that has one for each of the batch's; anything else as it is."""
    return value[rows] if has_rows(value, count) else value


def has_rows(value: Any, count: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == count

"""Weights that are one tensor in several modules (an embedding, the output layer), of which an adapter changes some.

With `modules_to_save=["embed_tokens"]` the adapted model embeds by the adapter's tensor and puts out by the base's.
Its checkpoint has to hold both, and a configuration that ties them would put one in the other's place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from redpeft.errors import UserError, some
from redpeft.models import on_meta

FLAG = "tie_word_embeddings"


def tied_weights(model: PreTrainedModel) -> list[list[str]]:
    """The names of each tensor that several modules have. A module that stands in several places has one name."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return [group for group in names.values() if len(group) > 1]


def untied(model: PreTrainedModel, head: Mapping[str, torch.Tensor]) -> tuple[PreTrainedModel, list[list[str]]]:
    """The model in which the tensors of `head` are tied to none that are others: itself, or one on the meta device
    whose configuration ties nothing, and the names that are not tied any more, as of `tied_weights`.

    Raises `UserError` for a class that ties them always, or computes something else where they are not tied.
    """
    ties = tied_weights(model)
    groups = [group for group in ties if _is_parted(group, head)]
    if not groups:
        return model, []
    config = copy.deepcopy(model.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        setattr(part, FLAG, False)
    again = type(config).from_dict(config.to_dict())
    parted = on_meta(type(model), again)
    if (
        tied_weights(parted)
        or _changes(model.config.to_dict(), again.to_dict())
        or any(map(_reads_flag, parted.modules()))
    ):
        mine = [name for group in groups for name in group if name in head]
        others = [name for group in groups for name in group if name not in head] or mine[1:]
        raise UserError(
            f"the adapter has a {some(mine)} of its own (modules_to_save), which is one tensor with {some(others)} in "
            f"a stock {type(model).__name__}: a checkpoint cannot hold them apart. Use the adapter as it is"
        )
    return parted, ties


def _is_parted(group: list[str], head: Mapping[str, torch.Tensor]) -> bool:
    found = [head.get(name) for name in group]
    tensors = [tensor for tensor in found if tensor is not None]
    return bool(tensors) and (len(tensors) < len(found) or not all(torch.equal(tensors[0], each) for each in tensors))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields beside the flag that the flag sets: T5 scales what its decoder puts out by it."""
    if isinstance(before.get("text_config"), dict):
        before, after = {**before, **before["text_config"]}, {**after, **after["text_config"]}
    return [name for name in before if name not in (FLAG, "text_config") and before[name] != after.get(name)]


def _reads_flag(module: torch.nn.Module) -> bool:
    """Whether the forward pass asks for it, as that of UMT5 and Switch Transformers does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and FLAG in code.co_names

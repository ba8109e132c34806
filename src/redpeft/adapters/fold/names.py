"""Which tensor of a checkpoint is which of the model: transformers renames while it loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel

from redpeft.errors import UserError

ENOUGH = 3  # parts of a name that must agree: more than `mlp.down_proj.weight` has beside its block's number


def rename(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The names that a checkpoint's tensors get: the model's own, with or without the prefix of its base model.

    A name that is not found so is kept, for transformers to convert as it loads.
    """
    own, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    found = {}
    for key in keys:
        choices = (key, f"{prefix}{key}", key.removeprefix(prefix))
        found[key] = next((name for name in choices if name in own), key)
    return found


def find_key(name: str, names: Mapping[str, str]) -> str:
    """The checkpoint's key of the model's tensor `name`: the one so called, or the one whose name ends most like it.

    Raises `UserError` where there is none, or several are equally near.
    """
    alike: dict[int, list[str]] = {}
    for key, new in names.items():
        if new == name:
            return key
        alike.setdefault(_same_ending(new, name), []).append(key)
    best = max(alike, default=0)
    if best <= ENOUGH or len(alike[best]) > 1:
        raise UserError(
            f"cannot tell which tensor of the checkpoint is {name}: transformers converts it while it loads; load the "
            "base model and save it with save_pretrained(..., save_original_format=False) first"
        )
    return alike[best][0]


def _same_ending(left: str, right: str) -> int:
    count = 0
    for one, other in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if one != other:
            return count
        count += 1
    return count

"""Which tensor of a checkpoint is which of the model: transformers renames while it loads."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from redpeft.errors import UserError

ENOUGH = 3  # parts of a name that must agree: more than `mlp.down_proj.weight` has beside its block's number


class Names:
    """The names of a checkpoint's tensors, by their keys in it.

    Attributes:
        written: what they are called in the folded checkpoint: as in the model, with or without the prefix of its
            base model, or as they were where transformers renames them in other ways as it loads.
        own: what they are in the model, as far as it is known.
    """

    def __init__(self, keys: Iterable[str], model: PreTrainedModel) -> None:
        keys, state, prefix = list(keys), model.state_dict().keys(), f"{model.base_model_prefix}."
        self.written = {
            key: next((name for name in (key, f"{prefix}{key}", key.removeprefix(prefix)) if name in state), key)
            for key in keys
        }
        self.own = self.written | _renamed_by_transformers(keys, model)

    def find(self, name: str) -> str:
        """The key of the model's tensor `name`: the one so called, or the one whose name ends most like it.

        Raises `UserError` where there is none, or several are equally near.
        """
        alike: dict[int, list[str]] = {}
        for key, own in self.own.items():
            if own == name:
                return key
            alike.setdefault(_same_ending(own, name), []).append(key)
        best = max(alike, default=0)
        if best <= ENOUGH or len(alike[best]) > 1:
            raise UserError(
                f"cannot tell which tensor of the checkpoint is {name}: transformers converts it while it loads; load "
                "the base model and save it with save_pretrained(..., save_original_format=False) first"
            )
        return alike[best][0]


def _renamed_by_transformers(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The model's names of the tensors that transformers 5 renames, those left out that it computes from several."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return {}
    transforms, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    found = {}
    for key in sorted(keys):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converter is None and name in state:
            found[key] = name
    return found


def _same_ending(left: str, right: str) -> int:
    count = 0
    for one, other in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if one != other:
            return count
        count += 1
    return count

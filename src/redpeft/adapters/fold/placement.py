"""What a stock checkpoint can carry of an adapter, known from configurations alone: no weights are read.

An edit after a linear layer is another linear layer: `W' = scale * W`, `b' = scale * b + bias`. Its bias is the hard
part where the layer has none. The choices, in this order:

1. The layer has a bias (BERT, GPT-2, ViT, ...): the checkpoint keeps its configuration.
2. A switch of the configuration adds biases (`mlp_bias` of Llama and many others). Switches are tried on the meta
   device. One that only adds biases to linear layers is exact, since the biases that no edit fills are zero.
3. On request, the model is written as Llama, which has such a switch, where both are the same function (`as_llama`).
4. What remains stays an edit beside the checkpoint (a bundle).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from redpeft.adapters.card import AUTO_CLASS
from redpeft.adapters.checkpoint import is_quantised
from redpeft.adapters.fold.llama import as_llama
from redpeft.adapters.folder import Adapter
from redpeft.errors import UserError, shorten_list
from redpeft.models import empty_model, load_config, on_meta, reads_tying, switch_on_biases
from redpeft.storage import TASK, read_json
from redpeft.tuner.sites import find_sites

# Placements: where a site's edit goes
FOLDED = "weight and bias"
NEW_BIAS = "weight, and a bias by"  # the changes of the configuration follow
BIAS_LEFT = "weight; its bias stays an edit"
LEFT = "stays an edit"
TIE = "tie_word_embeddings"


class Parts(NamedTuple):
    """Which vectors of a site's edit differ from the identity."""

    scale: bool = True
    bias: bool = True


@dataclass(frozen=True)
class Plan:
    """What a fold would write. `model`: the checkpoint's model on the meta device; `changes`: fields of its
    configuration that differ from the base's; `placements`: by site; `untied`: groups of names that are one tensor in
    the base and several in the checkpoint."""

    model: PreTrainedModel
    changes: dict[str, Any]
    placements: dict[str, str]
    untied: list[list[str]] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The sites that keep an edit, or the bias of one."""
        return [site for site, placement in self.placements.items() if placement in (BIAS_LEFT, LEFT)]


def plan_adapter(adapter: Adapter, original: PreTrainedModel, llama: bool) -> Plan:
    """The plan for an adapter of `original`, as Llama if `llama`. `UserError`: the adapter or Llama does not fit
    it."""
    parts = {
        site: Parts(bool((edit.scale != 1).any()), bool((edit.bias != 0).any()))
        for site, edit in adapter.edits.items()
    }
    if llama:
        name, config = as_llama(original.config, type(original).__name__)
        plan = plan_fold(on_meta(getattr(transformers, name), config), parts)
        plan = replace(plan, changes={"model_type": config.model_type, **plan.changes})
    else:
        plan = plan_fold(original, parts)
    model, untied = untie(plan.model, adapter.head)
    return replace(plan, model=model, changes={**plan.changes, TIE: False}, untied=untied) if untied else plan


def plan_fold(model: PreTrainedModel, sites: Mapping[str, Parts]) -> Plan:
    """Plan the fold of edits at `sites` of `model`, which is on the meta device.

    Raises `UserError` for a site that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [site for site in sites if site not in modules]:
        raise UserError(f"this base model ({type(model).__name__}) has no module {shorten_list(unknown)}")
    tied = {name for group in tied_weights(model) for name in group}
    placements = {site: placement(site, modules[site], parts, model.config, tied) for site, parts in sites.items()}
    without_bias = [site for site, placed in placements.items() if placed == BIAS_LEFT]
    if not without_bias or LEFT in placements.values():  # then a bundle is needed anyway
        return Plan(model, {}, placements)
    found = switch_on_biases(model, without_bias)
    if found is None:
        return Plan(model, {}, placements)
    changed, changes = found
    by_switch = f"{NEW_BIAS} {', '.join(f'{name}={value}' for name, value in changes.items())}"
    return Plan(changed, changes, placements | dict.fromkeys(without_bias, by_switch))


def placement(site: str, module: nn.Module, parts: Parts, config: PretrainedConfig, tied: Collection[str]) -> str:
    """Where an edit goes in a checkpoint with this configuration. `tied`: names of tensors that several modules
    share."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return LEFT
    if (parts.scale and f"{site}.weight" in tied) or (parts.bias and f"{site}.bias" in tied):
        return LEFT  # folding would change the other module too (Zamba's shared blocks)
    if parts.scale and is_quantised(config, site):
        return LEFT  # to scale its rows means to dequantise and quantise them again
    return FOLDED if module.bias is not None or not parts.bias else BIAS_LEFT


# --- the adapted model -----------------------------------------------------------------------------------------------


def empty_adapted_model(adapter: Adapter, config: PretrainedConfig, run: Path) -> PreTrainedModel:
    """The adapted model on the meta device, in the class of the adapter's task type.

    The labels of its head have the names in `run`/task.json, if that exists. Raises `UserError` for a head that fits
    no number of labels.
    """
    architectures = [(adapter.config.get("auto_mapping") or {}).get("base_model_class"), *(config.architectures or [])]
    if (task_type := adapter.config.get("task_type")) in AUTO_CLASS:
        model_class: Any = getattr(transformers, AUTO_CLASS[task_type])
    else:
        known = (getattr(transformers, name, None) for name in architectures if name)
        model_class = next(filter(None, known), AutoModel)
    task = read_json(run / TASK) if (run / TASK).is_file() else {}
    if names := task.get("label_names"):
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if kind := task.get("problem_type"):
        config.problem_type = kind
    sizes = sorted({len(tensor) for tensor in adapter.head.values() if tensor.ndim})
    for labels in [config.num_labels, *sizes]:
        if labels != config.num_labels:
            config.num_labels = labels
        model = on_meta(model_class, config)
        state = model.state_dict()
        if all(key in state and state[key].shape == tensor.shape for key, tensor in adapter.head.items()):
            return model
    raise UserError(f"the head of {adapter.folder} ({', '.join(adapter.head)}) does not fit {type(model).__name__}")


# --- tied weights ----------------------------------------------------------------------------------------------------
#
# Some weights are one tensor in several modules (an embedding and the output layer). With
# `modules_to_save=["embed_tokens"]` the adapted model embeds with the adapter's tensor and computes logits with the
# base's. Its checkpoint has to hold both, and its configuration must not tie them.


def tied_weights(model: PreTrainedModel) -> list[list[str]]:
    """The names of each tensor that several modules share. A module that is used in several places has one name."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return [group for group in names.values() if len(group) > 1]


def untie(model: PreTrainedModel, head: Mapping[str, torch.Tensor]) -> tuple[PreTrainedModel, list[list[str]]]:
    """A model in which the tensors of `head` can differ from those that they are tied to, and the groups of names that
    are not tied in it any more. The model itself and no groups where nothing has to be untied; otherwise a new one on
    the meta device, whose configuration ties nothing.

    Raises `UserError` for a class that ties them always, or computes something else where they are not tied.
    """
    ties = tied_weights(model)
    groups = [group for group in ties if _differ(group, head)]
    if not groups:
        return model, []
    config = copy.deepcopy(model.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        setattr(part, TIE, False)
    config = type(config).from_dict(config.to_dict())
    untied = on_meta(type(model), config)
    if (
        tied_weights(untied)
        or _other_fields(model.config.to_dict(), config.to_dict())
        or any(map(reads_tying, untied.modules()))
    ):
        mine = [name for group in groups for name in group if name in head]
        others = [name for group in groups for name in group if name not in head] or mine[1:]
        raise UserError(
            f"the adapter has a {shorten_list(mine)} of its own (modules_to_save), which is one tensor with "
            f"{shorten_list(others)} in a stock {type(model).__name__}: a checkpoint cannot hold them apart. Use the "
            "adapter as it is"
        )
    return untied, ties


def _differ(group: list[str], head: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head gives the names of a group different tensors, or gives one to some of them only."""
    tensors = [head[name] for name in group if name in head]
    return bool(tensors) and (
        len(tensors) < len(group) or not all(torch.equal(tensors[0], tensor) for tensor in tensors)
    )


def _other_fields(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields that change with the flag: T5 scales its decoder's output by one."""
    if isinstance(before.get("text_config"), dict):
        before, after = {**before, **before["text_config"]}, {**after, **after["text_config"]}
    return [name for name in before if name not in (TIE, "text_config") and before[name] != after.get(name)]


# --- the preview -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldPreview:
    """What folding would write for a model. `placements`: by site; `not_llama`: why the model cannot be written as
    Llama, None if it can."""

    architecture: str
    placements: dict[str, str]
    changes: dict[str, Any]
    not_llama: str | None

    @property
    def notes(self) -> list[str]:
        """What to choose."""
        if not any(placement in (BIAS_LEFT, LEFT) for placement in self.placements.values()):
            return ["A plain checkpoint carries all of it."]
        return [
            "Needs --format bundle: what stays an edit is an adapter beside the checkpoint.",
            f"--as llama: no, {self.not_llama}"
            if self.not_llama
            else "--as llama: the same function, written as Llama.",
        ]


def preview_fold(model: str, sites: str | Sequence[str] = "ffn", adapter: Adapter | None = None) -> FoldPreview:
    """Where the edits of an adapter would go on `model`, or whole edits at `sites`. Reads no weights."""
    if adapter is None:
        original = empty_model(model)
        plan = plan_fold(original, {site.name: Parts() for site in find_sites(original, sites)})
    else:
        original = empty_adapted_model(adapter, load_config(model), adapter.folder)
        plan = plan_adapter(adapter, original, llama=False)
    return FoldPreview(type(original).__name__, plan.placements, plan.changes, why_not_llama(original))


def why_not_llama(model: PreTrainedModel) -> str | None:
    """Why a model cannot be written as Llama; None if it can."""
    try:
        as_llama(model.config, type(model).__name__)
    except UserError as error:
        return str(error)
    return None

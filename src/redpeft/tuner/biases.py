"""Where a stock model has a place for the bias of a merged edit: a switch of its configuration, such as `mlp_bias`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def add_biases(model: PreTrainedModel, sites: Sequence[str]) -> bool:
    """Let the class of a merged model, whose layers at `sites` have got a bias, load it: switches of its configuration
    are set, and the biases that these add elsewhere are zeros. False where there are no such switches."""
    with torch.device("meta"):
        found = switch_on_biases(type(model)._from_config(copy.deepcopy(model.config)), sites)
    if found is None:
        return False
    changed, switches = found
    for name, value in switches.items():
        setattr(model.config.get_text_config(), name, value)
    for key in changed.state_dict().keys() - model.state_dict().keys():
        layer = model.get_submodule(key.rpartition(".")[0])
        zeros = layer.weight.new_zeros(changed.get_parameter(key).shape)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return True


def switch_on_biases(model: PreTrainedModel, sites: Sequence[str]) -> tuple[PreTrainedModel, dict[str, bool]] | None:
    """The fewest switches of the configuration that give all these sites a bias and change nothing else: the model
    with them, on the meta device, and the switches. None where there are none. `model` needs no weights."""
    text = model.config.get_text_config()
    switches = [name for name, value in text.to_dict().items() if value is False and "bias" in name]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            config = copy.deepcopy(model.config)
            for name in chosen:
                setattr(config.get_text_config(), name, True)
            try:
                with torch.device("meta"):
                    changed = type(model)._from_config(type(config).from_dict(config.to_dict()))
            except Exception:  # some configurations refuse some combinations, each in its own way
                continue
            if _only_adds_biases(model, changed) and all(changed.get_submodule(s).bias is not None for s in sites):
                return changed, dict.fromkeys(chosen, True)
    return None


def _only_adds_biases(model: PreTrainedModel, changed: PreTrainedModel) -> bool:
    before, after = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, changed))
    added = after.keys() - before.keys()
    kinds = [changed.get_submodule(key.rpartition(".")[0]) for key in added]
    return (
        all(before[key] == after.get(key) for key in before)
        and all(key.endswith(".bias") for key in added)
        and all(isinstance(module, (nn.Linear, Conv1D)) for module in kinds)
    )

"""What a stock checkpoint can carry of an edit, seen from the configuration alone: no weight is read.

An edit after a linear layer is another linear layer: `W' = scale * W`, `b' = scale * b + bias`. Its bias is the hard
part where the layer has none. In this order:

1. The layer has a bias (BERT, GPT-2, ViT, ...): the checkpoint keeps its configuration.
2. A switch of the configuration adds biases (`mlp_bias` of Llama and many others). Found by trying the switches on the
   meta device: one that only adds biases to linear layers is exact, since the biases that no edit fills are zero.
3. On request, the same model written as another that has such a switch (`as_llama`).
4. What is left over stays an edit beside the checkpoint (a bundle).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from redpeft.adapters.fold.ties import tied_weights
from redpeft.errors import UserError, some
from redpeft.models import switch_on_biases

# What becomes of a site's edit
FOLDED = "weight and bias"
NEW_BIAS = "weight, and a bias by"  # the changes of the configuration follow
BIAS_LEFT = "weight; its bias stays an edit"
LEFT = "stays an edit"


class Parts(NamedTuple):
    """Which parts of a site's edit are not the identity."""

    scale: bool = True
    bias: bool = True


@dataclass(frozen=True)
class Plan:
    """What a fold would write: `model` is the model of the checkpoint on the meta device, `changes` what its
    configuration gets beyond the base's, `forms` what becomes of each site's edit. `untied`: the names of each
    tensor of the base that is several in the checkpoint (see ties.py)."""

    model: PreTrainedModel
    changes: dict[str, Any]
    forms: dict[str, str]
    untied: list[list[str]] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The sites that keep an edit, or the bias of one."""
        return [site for site, form in self.forms.items() if form in (BIAS_LEFT, LEFT)]


def plan_fold(model: PreTrainedModel, sites: Mapping[str, Parts]) -> Plan:
    """Plan the fold of edits at `sites` of `model`, which is on the meta device.

    Raises `UserError` for a site that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [site for site in sites if site not in modules]:
        raise UserError(f"this base model ({type(model).__name__}) has no module {some(unknown)}")
    tied = {name for group in tied_weights(model) for name in group}
    forms = {site: _form(site, modules[site], parts, model.config, tied) for site, parts in sites.items()}
    without = [site for site, form in forms.items() if form == BIAS_LEFT]
    if not without or LEFT in forms.values():  # a bundle is needed anyway
        return Plan(model, {}, forms)
    found = switch_on_biases(model, without)
    if found is None:
        return Plan(model, {}, forms)
    changed, changes = found
    new = f"{NEW_BIAS} {', '.join(f'{name}={value}' for name, value in changes.items())}"
    return Plan(changed, changes, forms | dict.fromkeys(without, new))


def is_quantised(config: PretrainedConfig, site: str) -> bool:
    """Whether the checkpoint keeps this module's weight in a quantised form, by its configuration."""
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) or settings is None else settings.to_dict()
    if not settings:
        return False
    plain = settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ()
    return not any(name in site for name in plain)


def _form(site: str, module: nn.Module, parts: Parts, config: PretrainedConfig, tied: Collection[str]) -> str:
    if not isinstance(module, (nn.Linear, Conv1D)):
        return LEFT
    if (parts.scale and f"{site}.weight" in tied) or (parts.bias and f"{site}.bias" in tied):
        return LEFT  # it would change the other module too (Zamba's shared blocks)
    if parts.scale and is_quantised(config, site):
        return LEFT  # to scale its rows would take them apart and quantise them again
    return FOLDED if module.bias is not None or not parts.bias else BIAS_LEFT

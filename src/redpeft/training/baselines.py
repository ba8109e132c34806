"""The methods that a recipe can name: RED, and the baselines that it is compared with.

A new method is an entry here and, if it needs one, a function in peft_baselines.py or own_baselines.py. Modules are
named and not imported, so that a recipe can be read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pkgutil import resolve_name
from typing import Any

PEFT, OWN = "redpeft.training.peft_baselines", "redpeft.training.own_baselines"


@dataclass(frozen=True)
class Method:
    """What a method trains, and what it goes with.

    Attributes:
        options: the dataclass whose fields are the `method_options`, as "module:class". PEFT's methods have a
            `PeftConfig` and no `train`.
        rate: the default learning rate.
        defaults: options that have no default in the class, or another one.
        fit: of PEFT's methods, a function (model, options, task_type) -> options that completes the options for a
            model, or refuses it with a `UserError`.
        train: of the others, a function (model, options) -> names that changes the model and names the parameters to
            train beside the head.
        peft_type: PEFT's name, if an adapter of this method can be used without its run.
        own_weights: whether the base's own weights are trained; they are all held in fp32 then.
        quantised, packed, checkpointed: whether the method works with `base.load_in`, with `packing` and with
            `gradient_checkpointing`.
    """

    options: str
    rate: float
    defaults: dict[str, Any] = field(default_factory=dict)
    fit: str | None = None
    train: str | None = None
    peft_type: str | None = None
    own_weights: bool = False
    quantised: bool = False
    packed: bool = True
    checkpointed: bool = True

    @property
    def is_peft(self) -> bool:
        return self.train is None

    @property
    def options_class(self) -> Any:
        return resolve_name(self.options)

    @property
    def option_names(self) -> list[str]:
        """What `method_options` may hold."""
        return [each.name for each in fields(self.options_class)]


# Where options, defaults and rates come from: docs/reference/baselines.md.
METHODS = {
    "red": Method("redpeft.tuner:RedConfig", 3e-2, peft_type="REDPEFT", quantised=True),
    "lora": Method("peft:LoraConfig", 3e-3, fit=f"{PEFT}:fit_lora", peft_type="LORA", quantised=True),
    "ia3": Method("peft:IA3Config", 1e-2, fit=f"{PEFT}:fit_ia3", peft_type="IA3", quantised=True),
    "adapter": Method(f"{OWN}:BottleneckOptions", 3e-3, {"layer_norms": True}, train=f"{OWN}:add_bottlenecks"),
    "adapter_ffn": Method(
        f"{OWN}:BottleneckOptions", 1e-2, {"sites": ["ffn"], "activation": "relu"}, train=f"{OWN}:add_bottlenecks"
    ),
    "adapter_drop": Method(
        f"{OWN}:BottleneckOptions", 3e-3, {"layer_norms": True, "drop_layers": 5}, train=f"{OWN}:add_bottlenecks"
    ),
    "prompt": Method(
        "peft:PromptTuningConfig",
        1e-2,
        # of an encoder-decoder the encoder alone gets a prompt: PEFT counts a second one, which it never uses
        {"num_virtual_tokens": 100, "prompt_tuning_init": "SAMPLE_VOCAB", "num_transformer_submodules": 1},
        fit=f"{PEFT}:fit_prompt",
        packed=False,
    ),
    "prefix": Method(
        "peft:PrefixTuningConfig",
        1e-2,
        {"num_virtual_tokens": 16},
        fit=f"{PEFT}:fit_prefix",
        packed=False,
        checkpointed=False,
    ),
    "bitfit": Method(f"{OWN}:BitFitOptions", 3e-3, train=f"{OWN}:biases", own_weights=True),
    "top_layers": Method(f"{OWN}:TopLayersOptions", 1e-3, train=f"{OWN}:top_layers", own_weights=True),
    "full": Method(f"{OWN}:NoOptions", 1e-4, train=f"{OWN}:everything", own_weights=True),
    "head": Method(f"{OWN}:NoOptions", 3e-2, train=f"{OWN}:nothing"),
}
DEFAULT_RATES = {name: method.rate for name, method in METHODS.items()}

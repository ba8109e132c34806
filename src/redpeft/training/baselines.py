"""The methods that a recipe can name: RED, the baselines that it is compared with, and PEFT's other methods.

A new baseline is an entry here and, if it needs one, a function in peft_baselines.py or own_baselines.py. Modules are
named and not imported, so that a recipe can be read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from runpy import run_path
from typing import Any

from redpeft.errors import UserError

PEFT, OWN = "redpeft.training.peft_baselines", "redpeft.training.own_baselines"


@dataclass(frozen=True)
class Method:
    """What a method trains, and what it goes with.

    Attributes:
        options: the dataclass whose fields are the `method_options`, as "module:class". PEFT's methods have a
            `PeftConfig` and no `train`.
        rate: the default learning rate. None: there is none, and a recipe has to give one.
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
    rate: float | None
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


class Methods(dict[str, Method]):
    """RED and the baselines by name. `METHODS[name]` also finds PEFT's other methods, which are not listed."""

    def __missing__(self, name: str) -> Method:
        return find_peft_method(name)


# Where options, defaults and rates come from: docs/reference/baselines.md.
METHODS = Methods(
    {
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
)
DEFAULT_RATES = {name: method.rate for name, method in METHODS.items()}

# PEFT's methods that the training loop of a recipe cannot train, and why.
NEEDS_MORE = {
    "adalora": "PEFT has to be called after each step, or it never changes the ranks",
    "cpt": "it labels the context's tokens with the values of one data set",
    "multitask_prompt_tuning": "each row has to name its task",
    "poly": "each row has to name its task",
    "xlora": "it mixes LoRA adapters that are already trained",
}


@cache
def find_peft_method(name: str) -> Method:
    """PEFT's method of this name: its `PeftType` in small letters, such as "vera".

    Raises `UserError` for a name that PEFT does not have, and for a method that needs more than a recipe can give.
    """
    if name in NEEDS_MORE:
        raise UserError(f"method {name} cannot be trained by a recipe: {NEEDS_MORE[name]}")
    own = {str(method.peft_type).lower() for method in METHODS.values()}
    others = peft_types() - NEEDS_MORE.keys() - own
    if name not in others:
        raise UserError(
            f"no method is called {name!r}: choose {', '.join(METHODS)}, or one of PEFT's others: "
            f"{', '.join(sorted(others))}"
        )
    from peft import PeftType, PromptLearningConfig  # only here: it imports torch, and a wrong name needs none
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    options = f"{config.__module__}:{config.__qualname__}"
    if issubclass(config, PromptLearningConfig):  # virtual tokens before the row
        return Method(options, None, {"num_virtual_tokens": 16}, fit=f"{PEFT}:fit_prompt", packed=False)
    return Method(options, None)


def peft_types() -> set[str]:
    """PEFT's methods, in small letters, from the one file that names them: importing PEFT would import torch."""
    spec: Any = find_spec("peft")
    kinds = run_path(str(Path(spec.origin).parent / "utils" / "peft_types.py"))["PeftType"]
    return {kind.value.lower() for kind in kinds}

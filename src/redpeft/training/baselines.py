"""RED and the baselines beside it: what each trains, at which rate, all with the same treatment of the head."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from pydantic import ValidationError
from transformers import PreTrainedModel

from redpeft import RedConfig
from redpeft.adapters.files import load_adapter
from redpeft.errors import UserError
from redpeft.storage import find_adapter
from redpeft.tasks import TASKS
from redpeft.training.bottleneck import BottleneckOptions, add_bottlenecks
from redpeft.training.partial import (
    BitFitOptions,
    NoOptions,
    TopLayersOptions,
    biases,
    everything,
    nothing,
    top_layers,
)
from redpeft.training.prompts import fit_prefix, fit_prompt

if TYPE_CHECKING:
    from redpeft.training.recipe import Recipe

TASK_TYPES = {name: task.task_type for name, task in TASKS.items()}
Fit = Callable[[PreTrainedModel, "Recipe", dict[str, Any]], dict[str, Any]]


def _lora_targets(model: PreTrainedModel, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return options if known else {"target_modules": "all-linear", **options}


def _ia3_targets(model: PreTrainedModel, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    family = model.config.model_type
    if "target_modules" not in options and family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise UserError(
            f"PEFT knows no IA3 target modules for {family} models: name them in method_options.target_modules and "
            "method_options.feedforward_modules"
        )
    return options


def _as_given(model: PreTrainedModel, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    return options


@dataclass(frozen=True)
class Method:
    """What a method needs. Those with a `PeftConfig` are PEFT's, which gets it; of the others `train` changes the
    model and names the parameters to train beside the head."""

    options: Any  # the dataclass whose fields are the method_options
    rate: float  # the default learning rate
    defaults: dict[str, Any] = field(default_factory=dict)  # options where the class has none, or others
    fit: Fit = _as_given  # PEFT's: complete the options for a model, or refuse it
    train: Callable[[PreTrainedModel, Any], set[str]] = nothing
    own_weights: bool = False  # the base's own weights are trained: hold them all in fp32

    @property
    def is_peft(self) -> bool:
        return issubclass(self.options, PeftConfig)

    @property
    def option_names(self) -> list[str]:
        """What method_options may hold."""
        return [each.name for each in fields(self.options)]


# Where options, defaults and rates come from: docs/reference/baselines.md.
METHODS = {
    "red": Method(RedConfig, 3e-2),
    "lora": Method(LoraConfig, 3e-3, fit=_lora_targets),
    "ia3": Method(IA3Config, 1e-2, fit=_ia3_targets),
    "adapter": Method(BottleneckOptions, 3e-3, {"layer_norms": True}, train=add_bottlenecks),
    "adapter_ffn": Method(BottleneckOptions, 1e-2, {"sites": ["ffn"], "activation": "relu"}, train=add_bottlenecks),
    "adapter_drop": Method(BottleneckOptions, 3e-3, {"layer_norms": True, "drop_layers": 5}, train=add_bottlenecks),
    "prompt": Method(
        PromptTuningConfig,
        1e-2,
        # of an encoder-decoder the encoder alone gets a prompt: PEFT counts a second one, which it never uses
        {"num_virtual_tokens": 100, "prompt_tuning_init": "SAMPLE_VOCAB", "num_transformer_submodules": 1},
        fit=fit_prompt,
    ),
    "prefix": Method(PrefixTuningConfig, 1e-2, {"num_virtual_tokens": 16}, fit=fit_prefix),
    "bitfit": Method(BitFitOptions, 3e-3, train=biases, own_weights=True),
    "top_layers": Method(TopLayersOptions, 1e-3, train=top_layers, own_weights=True),
    "full": Method(NoOptions, 1e-4, train=everything, own_weights=True),
    "head": Method(NoOptions, 3e-2, train=nothing),
}
DEFAULT_RATES = {name: method.rate for name, method in METHODS.items()}


def apply_method(model: PreTrainedModel, recipe: Recipe, new_weights: Iterable[str] = ()) -> torch.nn.Module:
    """`model` ready to train by `recipe.method`: a PeftModel for PEFT's methods, or the model with the rest frozen.

    `new_weights` are the names of the weights that the checkpoint did not hold; they are trained with every method,
    as is the task's head. Everything that is trained is held in fp32 (fp64 of an fp64 base). Raises `UserError` for
    options that the method lacks or that do not fit the model.
    """
    check_options(recipe)
    head = head_modules(model, recipe.task, new_weights)
    if recipe.init_from is not None:
        trained: torch.nn.Module = load_adapter(model, find_adapter(recipe.init_from), is_trainable=True)
    elif METHODS[recipe.method].is_peft:
        trained = _add_adapter(model, recipe, head)
    else:
        _unfreeze(model, recipe, head)
        trained = model
    if recipe.head == "last":
        in_head = head_parameters(trained, head)
        for name in before_last(in_head):
            in_head[name].requires_grad_(False)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return trained


class Trained(NamedTuple):
    """How many numbers a method trains."""

    method: int  # beside the head
    head: int


def trainable_parameters(model: PreTrainedModel, recipe: Recipe, new_weights: Iterable[str] = ()) -> Trained:
    """What the recipe trains of `model`, counted without training: a model on the meta device will do.

    The method is applied to `model`, which is of no other use afterwards. Arguments and errors as in `apply_method`.
    """
    head = head_modules(model, recipe.task, new_weights)
    trained = apply_method(model, recipe, new_weights)
    in_head = sum(parameter.numel() for parameter in head_parameters(trained, head).values())
    return Trained(sum(p.numel() for p in trained.parameters() if p.requires_grad) - in_head, in_head)


def head_modules(model: PreTrainedModel, task: str, new_weights: Iterable[str] = ()) -> list[str]:
    """Names of the modules that are trained in full whatever the method.

    In classification these are the modules beside the encoder (BERT: `classifier`; RoBERTa: `classifier` with its
    `dense` and `out_proj`; DistilBERT: `pre_classifier` and `classifier`), and in every task the modules whose weights
    the checkpoint did not hold (such as `bert.pooler.dense` of a checkpoint without a pooler; a pretrained pooler is
    part of the encoder and stays frozen).
    """
    names = []
    if TASK_TYPES[task].endswith("_CLS") and hasattr(model, model.base_model_prefix):
        beside = ((name, child) for name, child in model.named_children() if name != model.base_model_prefix)
        names = [name for name, child in beside if next(child.parameters(), None) is not None]
    for owner in sorted({key.rpartition(".")[0] for key in new_weights if key in dict(model.named_parameters())}):
        if owner and not any(owner == name or owner.startswith(name + ".") for name in names):
            names.append(owner)
    return names


def head_parameters(model: torch.nn.Module, head: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of `model` that lie in the modules `head` (named as before the method was applied)."""
    inside = tuple(f".{name}." for name in head)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(part in f".{name}" for part in inside)
    }


def before_last(weights: Iterable[str]) -> list[str]:
    """Of a head's weights, in their order in the model, those of the layers before the last."""
    names = list(weights)
    return [name for name in names if name.rpartition(".")[0] != names[-1].rpartition(".")[0]]


def all_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's method_options, with what the method chooses where they are silent."""
    return METHODS[recipe.method].defaults | recipe.method_options


def check_options(recipe: Recipe) -> None:
    """Raises `UserError` for method_options that are wrong whatever the model."""
    cls = METHODS[recipe.method].options
    known = METHODS[recipe.method].option_names
    if recipe.method_options and not known:
        raise UserError(f"method {recipe.method} has no options: leave out {', '.join(recipe.method_options)}")
    for key in recipe.method_options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"method_options: {cls.__name__} has no {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    _options(recipe, all_options(recipe))


def _options(recipe: Recipe, values: dict[str, Any]) -> Any:
    """An instance of the method's options."""
    method = METHODS[recipe.method]
    with _explained():
        return method.options(**values, **({"task_type": TASK_TYPES[recipe.task]} if method.is_peft else {}))


def _add_adapter(model: PreTrainedModel, recipe: Recipe, head: list[str]) -> torch.nn.Module:
    values = METHODS[recipe.method].fit(model, recipe, all_options(recipe))
    values["modules_to_save"] = [*head, *(values.get("modules_to_save") or [])] or None
    config = _options(recipe, values)
    with _explained():
        trained = get_peft_model(model, config, revision=recipe.base.revision)
    for each in trained.peft_config.values():  # to which PEFT adds the names of heads, also those that are there
        if heads := getattr(each, "modules_to_save", None):
            each.modules_to_save = list(dict.fromkeys(heads))
    return trained


@contextmanager
def _explained() -> Iterator[None]:
    """Errors about options as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"method_options: {where}: {problem['msg']}, not {problem['input']!r}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"method_options: {' '.join(str(error).split())}") from None


def _unfreeze(model: PreTrainedModel, recipe: Recipe, head: list[str]) -> None:
    """Freeze all but the head and what the method trains."""
    names = METHODS[recipe.method].train(model, _options(recipe, all_options(recipe)))
    if not names and not head:
        raise UserError("method head needs a task with a head: classification or token-classification")
    inside = tuple(f"{module}." for module in head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(inside))

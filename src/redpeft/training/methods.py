"""RED and the baselines beside it: what each trains, at which rate, all with the same treatment of the head."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from transformers import PreTrainedModel

from redpeft import RedConfig
from redpeft.adapters.files import find_adapter, load_adapter
from redpeft.errors import UserError

if TYPE_CHECKING:
    from redpeft.training.recipe import Recipe

# RED's by the study in docs/explanation/units.md; the others' by a small grid on the demo's validation rows.
DEFAULT_RATES = {"red": 3e-2, "lora": 3e-3, "ia3": 1e-2, "bitfit": 1e-3, "full": 1e-4, "head": 3e-2}
CONFIGS = {"red": RedConfig, "lora": LoraConfig, "ia3": IA3Config}
TASK_TYPES = {"classification": "SEQ_CLS", "token-classification": "TOKEN_CLS", "instruction": "CAUSAL_LM"}


def apply_method(model: PreTrainedModel, recipe: Recipe, new_weights: Iterable[str] = ()) -> torch.nn.Module:
    """`model` ready to train by `recipe.method`: a PeftModel (red, lora, ia3) or the model with the rest frozen.

    `new_weights` are the names of the weights that the checkpoint did not hold; they are trained with every method,
    as is the task's head. Everything that is trained is held in fp32. Raises `UserError` for options that the method
    lacks or that do not fit the model.
    """
    check_options(recipe)
    head = head_modules(model, recipe.task, new_weights)
    if recipe.init_from is not None:
        trained: torch.nn.Module = load_adapter(model, find_adapter(recipe.init_from), is_trainable=True)
    elif recipe.method in CONFIGS:
        trained = _add_adapter(model, recipe, head)
    else:
        _unfreeze(model, recipe.method, head)
        trained = model
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trained


def head_modules(model: PreTrainedModel, task: str, new_weights: Iterable[str] = ()) -> list[str]:
    """Names of the modules that are trained in full whatever the method.

    In classification these are the modules beside the encoder (BERT: `classifier`; RoBERTa: `classifier` with its
    `dense` and `out_proj`; DistilBERT: `pre_classifier` and `classifier`), and in every task the modules whose weights
    the checkpoint did not hold (such as `bert.pooler.dense` of a checkpoint without a pooler; a pretrained pooler is
    part of the encoder and stays frozen).
    """
    names = []
    if task != "instruction" and hasattr(model, model.base_model_prefix):
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


def check_options(recipe: Recipe) -> None:
    """Raises `UserError` for method_options that are wrong whatever the model."""
    if recipe.method not in CONFIGS:
        if recipe.method_options:
            raise UserError(f"method {recipe.method} has no options: leave out {', '.join(recipe.method_options)}")
        return
    cls = CONFIGS[recipe.method]
    known = [field.name for field in fields(cls)]
    for key in recipe.method_options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"method_options: {cls.__name__} has no {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    with _explained():
        cls(task_type=TASK_TYPES[recipe.task], **recipe.method_options)


def _add_adapter(model: PreTrainedModel, recipe: Recipe, head: list[str]) -> torch.nn.Module:
    options = dict(recipe.method_options)
    options["modules_to_save"] = [*head, *(options.get("modules_to_save") or [])] or None
    with _explained():
        return get_peft_model(model, _config(recipe, model, options), revision=recipe.base.revision)


def _config(recipe: Recipe, model: PreTrainedModel, options: dict[str, Any]) -> PeftConfig:
    family = model.config.model_type
    if recipe.method == "lora" and family not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        options.setdefault("target_modules", "all-linear")
    if (
        recipe.method == "ia3"
        and "target_modules" not in options
        and family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    ):
        raise UserError(
            f"PEFT knows no IA3 target modules for {family} models: name them in method_options.target_modules and "
            "method_options.feedforward_modules"
        )
    return CONFIGS[recipe.method](task_type=TASK_TYPES[recipe.task], **options)


@contextmanager
def _explained() -> Iterator[None]:
    """PEFT's errors about a configuration as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"method_options: {' '.join(str(error).split())}") from None


def _unfreeze(model: PreTrainedModel, method: str, head: list[str]) -> None:
    """Freeze all but the head, and but the biases (bitfit) or nothing (full)."""
    if method == "head" and not head:
        raise UserError("method head needs a task with a head: classification or token-classification")
    if method == "bitfit" and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise UserError(f"method bitfit trains biases, and {type(model).__name__} has none")
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(module + ".") for module in head)
        parameter.requires_grad_(method == "full" or in_head or (method == "bitfit" and name.endswith("bias")))

"""The model that a recipe trains: a base model, RED or a baseline on it, and the task's head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

from redpeft.adapters.folder import load_adapter
from redpeft.console import log_main
from redpeft.errors import UserError, did_you_mean
from redpeft.models import (
    DTYPE_ARGUMENT,
    DTYPES,
    QUANTISERS,
    SLOW_BF16,
    adapter_tokenizer,
    bf16_slowdown,
    choose_precision,
    draw_weights,
    find_base,
    leave_unpacked,
    load_tokenizer,
    new_weights,
    quantised_weights,
    quantization_config,
    quiet,
    read_chat_template,
    tokenizer_digest,
    training_device,
)
from redpeft.storage import ADAPTER, MODEL, TRAINED, find_adapter, replaced_folder
from redpeft.tasks.base import TASKS, Task
from redpeft.tasks.chats import set_chat_template
from redpeft.training.recipe import Recipe


@dataclass(frozen=True)
class Learner:
    """A base model with what a recipe trains in it.

    Attributes:
        head: the modules that are trained whole.
        new: the weights that the base's checkpoint does not have, which are drawn by the recipe's seed.
        digest: of the tokenizer as it was loaded.
        chat_template: None if it is the base's.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    head: list[str]
    new: list[str]
    digest: str
    chat_template: str | None


def build_learner(recipe: Recipe, task: Task) -> Learner:
    """Load the base model and add what the recipe trains.

    The weights of a new head are drawn by the recipe's seed. With `head: last`, the layers before the last are drawn
    by a fixed seed, so that all jobs on a base share them.
    """
    base, tokenizer = load_base(recipe, task)
    own = tokenizer.chat_template
    if recipe.init_from is not None:
        tokenizer.chat_template = read_chat_template(find_adapter(recipe.init_from)) or own
    set_chat_template(tokenizer, recipe.data.chat_template)
    template = task.chat_template(tokenizer)
    digest = tokenizer_digest(tokenizer)
    new = new_weights(base, recipe.base.model, recipe.base.revision)
    head = head_modules(base, recipe.task, new)
    if recipe.head == "last":
        inside = tuple(f"{module}." for module in head)
        frozen = set(before_last(name for name, _ in base.named_parameters() if name.startswith(inside)))
        draw_weights(base, frozen.intersection(new), seed=0)
        new = [name for name in new if name not in frozen]
    draw_weights(base, new, recipe.seed)
    return Learner(
        apply_method(base, recipe, new), tokenizer, head, new, digest, None if template == own else template
    )


def load_base(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the task's head, in the number format that fits the hardware and the method, and its
    tokenizer.

    Raises `UserError` for a folder or hub name that cannot be read, and for a `load_in` that changes no weight of this
    model.
    """
    name, revision, load_in = recipe.base.model, recipe.base.revision, recipe.base.load_in
    precision = choose_precision(recipe.precision, recipe.base.dtype)
    if precision == "bf16":
        _warn_of_slow_bf16(recipe.base.dtype)
    if recipe.base.dtype == "auto":
        dtype: Any = torch.float32 if recipe.chosen_method.own_weights or precision == "fp32" else "auto"
    elif recipe.base.dtype != "fp32" and precision == "fp32":
        raise UserError(f"base.dtype {recipe.base.dtype} needs a precision of 16 bits too: bf16, or fp16 on a GPU")
    else:
        dtype = DTYPES[recipe.base.dtype]
    with quiet():  # transformers would report that the head is new
        tokenizer = load_tokenizer(name, revision=revision)
        options: dict[str, Any] = {DTYPE_ARGUMENT: dtype}
        if load_in is not None:
            if find_base(name).gguf_file is not None:
                raise UserError(
                    f"base.load_in cannot quantise a GGUF file: write an ordinary folder first with redpeft "
                    f"export-base {name} --out FOLDER, or leave load_in out"
                )
            empty = task.load_model(name, tokenizer, revision=revision, device_map="meta")
            head = head_modules(empty, recipe.task, new_weights(empty, name, revision))
            options["quantization_config"] = quantization_config(load_in, head, DTYPES[precision])
        model = task.load_model(name, tokenizer, revision=revision, **options)
    if load_in is not None and not quantised_weights(model):
        raise UserError(
            f"base.load_in {load_in} changes no weight of {type(model).__name__}: choose another of "
            f"{', '.join(QUANTISERS)}, or leave it out"
        )
    leave_unpacked(model)  # for every method, so that a loaded run scores as it did in training
    return model, tokenizer


def _warn_of_slow_bf16(dtype: str) -> None:
    """Warn before the first step if steps would take minutes, not seconds. `dtype`: the recipe's `base.dtype`."""
    if training_device().type == "cpu" and (times := bf16_slowdown()) > SLOW_BF16:
        fields = "precision and base.dtype" if dtype == "bf16" else "precision"
        why = "this CPU, which has no instructions for it"
        log_main(f"bf16 takes {times:.0f} times as long as fp32 on {why}: set {fields} to fp32")


# --- saving and loading ---------------------------------------------------------------------------------------------


def save_model(
    model: PreTrainedModel | PeftModel,
    learner: Learner,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter/ or model/ into a run folder. The tokenizer is saved with a whole model, and otherwise if it is no
    longer the base's; if only its chat template is new, that alone. `state`: the tensors, if the model itself holds
    only a part of them."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = len(trained) == len(list(model.parameters()))
    with replaced_folder(folder / (ADAPTER if isinstance(model, PeftModel) else MODEL)) as target:
        if isinstance(model, PeftModel):
            model.save_pretrained(target, state_dict=state, selected_adapters=["default"])  # not TRL's reference
        elif whole:
            model.save_pretrained(target, state_dict=state)
        else:  # only the trained weights; they are put into the base model later
            tensors = {name: tensor for name, tensor in (state or model.state_dict()).items() if name in trained}
            model.config.save_pretrained(target)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / TRAINED)
        if whole or tokenizer_digest(learner.tokenizer) != learner.digest:
            learner.tokenizer.save_pretrained(target)
        if learner.chat_template is not None:
            (target / CHAT_TEMPLATE_FILE).write_text(learner.chat_template, encoding="utf-8")


def load_trained(recipe: Recipe, folder: Path, task: Task) -> tuple[Any, PreTrainedTokenizerBase]:
    """The trained model of a run folder, and its tokenizer.

    Raises `UserError` for a base model that the run was not trained on.
    """
    method = recipe.chosen_method
    saved = find_adapter(folder) if method.is_peft else folder / MODEL
    if not method.is_peft and not (saved / TRAINED).is_file():  # a whole model
        whole = recipe.base.model_copy(update={"model": str(saved), "revision": None})
        return load_base(recipe.model_copy(update={"base": whole}), task)
    base, tokenizer = load_base(recipe, task)
    tokenizer = adapter_tokenizer(saved, tokenizer)
    if recipe.method == "red":
        return load_adapter(base, saved), tokenizer
    if method.is_peft:
        _fit(recipe, base)
        return PeftModel.from_pretrained(base, saved), tokenizer
    model = apply_method(base, recipe)  # adds bottleneck adapters or biases, which the base does not have
    trained, own = load_file(saved / TRAINED), dict(model.named_parameters())
    wrong = [name for name, tensor in trained.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise UserError(
            f"{saved / TRAINED} was trained on another base model: {', '.join(wrong[:3])} do not fit this one"
        )
    model.load_state_dict(trained, strict=False)
    return model, tokenizer


# --- methods --------------------------------------------------------------------------------------------------------


def apply_method(model: PreTrainedModel, recipe: Recipe, new_weights: Iterable[str] = ()) -> torch.nn.Module:
    """`model`, ready to be trained by `recipe.method`: a PeftModel for PEFT's methods, or the model with all else
    frozen.

    `new_weights` are the names of the weights that the checkpoint does not have; like the task's head, they are always
    trained. Everything that is trained is held in fp32 (fp64 for an fp64 base). Raises `UserError` for options that
    the method does not have or that do not fit the model.
    """
    recipe = recipe.resolved()
    check_options(recipe)
    head = head_modules(model, recipe.task, new_weights)
    if recipe.init_from is not None:
        trained: torch.nn.Module = load_adapter(model, find_adapter(recipe.init_from), is_trainable=True)
    elif recipe.chosen_method.is_peft:
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
    """How many parameters the recipe trains in `model`, counted without training. A model on the meta device is
    enough.

    The method is applied to `model`, which cannot be used for anything else afterwards. Arguments and errors as in
    `apply_method`.
    """
    recipe = recipe.resolved()
    head = head_modules(model, recipe.task, new_weights)
    trained = apply_method(model, recipe, new_weights)
    in_head = sum(parameter.numel() for parameter in head_parameters(trained, head).values())
    return Trained(sum(p.numel() for p in trained.parameters() if p.requires_grad) - in_head, in_head)


def check_options(recipe: Recipe) -> None:
    """Raises `UserError` for method_options that are wrong for every model."""
    cls = recipe.chosen_method.options_class
    known = recipe.chosen_method.option_names
    if recipe.method_options and not known:
        raise UserError(f"method {recipe.method} has no options: leave out {', '.join(recipe.method_options)}")
    for key in recipe.method_options:
        if key not in known:
            raise UserError(f"method_options: {cls.__name__} has no {key!r}{did_you_mean(key, known)}")
    _options(recipe, recipe.all_options)


def _options(recipe: Recipe, values: dict[str, Any]) -> Any:
    """An instance of the method's options."""
    method = recipe.chosen_method
    with _explained():
        return method.options_class(
            **values, **({"task_type": TASKS[recipe.task].task_type} if method.is_peft else {})
        )


def _fit(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """The options of one of PEFT's methods for this model."""
    fit, options = recipe.chosen_method.fit, recipe.all_options
    return resolve_name(fit)(model, options, TASKS[recipe.task].task_type) if fit else options


def _add_adapter(model: PreTrainedModel, recipe: Recipe, head: list[str]) -> torch.nn.Module:
    values = _fit(recipe, model)
    values["modules_to_save"] = [*head, *(values.get("modules_to_save") or [])] or None
    config = _options(recipe, values)
    with _explained():
        trained = get_peft_model(model, config, revision=recipe.base.revision)
    for each in trained.peft_config.values():  # PEFT adds the names of heads again
        if heads := getattr(each, "modules_to_save", None):
            each.modules_to_save = list(dict.fromkeys(heads))
    return trained


@contextmanager
def _explained() -> Iterator[None]:
    """While inside, errors about options become `UserError`."""
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
    change = resolve_name(recipe.chosen_method.train or "")
    names = change(model, _options(recipe, recipe.all_options))
    if not names and not head:
        raise UserError("method head needs a task with a head: classification or token-classification")
    inside = tuple(f"{module}." for module in head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(inside))


# --- heads ----------------------------------------------------------------------------------------------------------


def head_modules(model: PreTrainedModel, task: str, new_weights: Iterable[str] = ()) -> list[str]:
    """Names of the modules that are always trained in full.

    In classification these are the modules beside the encoder (BERT: `classifier`; RoBERTa: `classifier` with its
    `dense` and `out_proj`; DistilBERT: `pre_classifier` and `classifier`). In every task they are also the modules
    whose weights the checkpoint does not have, such as `bert.pooler.dense` of a checkpoint without a pooler. A
    pretrained pooler is part of the encoder and stays frozen.
    """
    names = []
    if TASKS[task].task_type.endswith("_CLS") and hasattr(model, model.base_model_prefix):
        beside = ((name, child) for name, child in model.named_children() if name != model.base_model_prefix)
        names = [name for name, child in beside if next(child.parameters(), None) is not None]
    own = dict(model.named_parameters())
    for owner in sorted({key.rpartition(".")[0] for key in new_weights if key in own}):
        if owner and not any(owner == name or owner.startswith(name + ".") for name in names):
            names.append(owner)
    return names


def head_parameters(model: torch.nn.Module, head: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of `model` in the modules `head`, which are named as before the method was applied."""
    inside = tuple(f".{name}." for name in head)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(part in f".{name}" for part in inside)
    }


def before_last(weights: Iterable[str]) -> list[str]:
    """The weights of a head that are not in its last layer. `weights`: all of them, in the model's order."""
    names = list(weights)
    return [name for name in names if name.rpartition(".")[0] != names[-1].rpartition(".")[0]]

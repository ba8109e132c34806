"""One run in hand: its data, its model and its Trainer; how it begins, and what it leaves in its folder."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import redpeft
from redpeft.adapters.card import write_card
from redpeft.adapters.files import read_adapter
from redpeft.console import log_main
from redpeft.errors import UserError
from redpeft.models import (
    DTYPE_ARGUMENT,
    DTYPES,
    QUANTISERS,
    SLOW_BF16,
    bf16_slowdown,
    choose_precision,
    draw_weights,
    leave_unpacked,
    load_tokenizer,
    new_weights,
    quantised_weights,
    quantization_config,
    quiet,
    require_folder,
    require_quantiser,
    tokenizer_digest,
)
from redpeft.storage import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    PLOTS,
    RECIPE,
    RESULT,
    TASK,
    TRAINED,
    clean_checkpoints,
    find_adapter,
    find_run,
    read_json,
    replaced_folder,
    to_json,
    write_atomically,
)
from redpeft.tasks import Task, read_data
from redpeft.training.baselines import METHODS, apply_method, before_last, check_options, head_modules, head_parameters
from redpeft.training.callbacks import TIMES
from redpeft.training.encoding import by_length, encode_splits
from redpeft.training.plots import plot_run
from redpeft.training.recipe import Recipe
from redpeft.training.trainer import as_evaluated, check_reporters, make_trainer, rows_at_once, trainer_classes


@dataclass(frozen=True)
class Learner:
    """A base model with what a recipe trains in it. `head`: the modules that are trained whole; `new`: its weights
    that are drawn by the seed, since the base's checkpoint did not hold them; `digest`: of the base's tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    head: list[str]
    new: list[str]
    digest: str


@dataclass(frozen=True)
class Run:
    """A run that is ready to train. `encoded` holds the splits as its Trainer takes them; `rows_cut` and
    `rows_left_out` count what that took away of each, and `notes` say it."""

    recipe: Recipe
    folder: Path
    task: Task
    splits: dict[str, Dataset]
    encoded: dict[str, Dataset]
    rows_cut: dict[str, int]
    rows_left_out: dict[str, int]
    notes: list[str]
    learner: Learner
    trainer: Any

    def begin(self) -> None:
        """Write what the run is about, and clear away what a killed process left half written."""
        self.recipe.save(self.folder / RECIPE)
        write_atomically(self.folder / TASK, to_json(self.task.to_dict(), indent=2))
        clean_checkpoints(self.folder / CHECKPOINTS)

    def finish(self, scores: dict[str, Any], times: dict[str, Any], plots: bool = True) -> None:
        """Write the adapter's card and the pictures, and last the result: its presence says that the run is done."""
        result = _describe(self) | scores | times
        result["rows"] = {name: len(split) for name, split in self.splits.items()}
        result |= {"rows_cut": self.rows_cut, "rows_left_out": self.rows_left_out}
        if plots:
            plot_run(self.trainer.state.log_history, self.task.metric, self.folder / PLOTS, result["best_epoch"])
        _write_card(self, result)
        write_atomically(self.folder / RESULT, to_json(result, indent=2))


def check_recipe(recipe: Recipe) -> None:
    """Raises `UserError` for what can be seen to be wrong in a recipe before anything is read or loaded."""
    require_folder(recipe.base.model)
    rows_at_once(recipe)
    choose_precision(recipe.precision, recipe.base.dtype)
    if recipe.base.load_in is not None:
        require_quantiser(recipe.base.load_in)
    check_options(recipe)
    check_reporters(recipe)
    trainer_classes(recipe)
    if recipe.init_from is not None:
        read_adapter(find_adapter(recipe.init_from))


def read_task(recipe: Recipe) -> tuple[Task, dict[str, Dataset]]:
    """What the recipe's data asks for, and the data by split. UserError: data that is missing or wrong."""
    chosen = {key: value for key in ("problem_type", "metric") if (value := getattr(recipe, key)) is not None}
    task, splits = read_data(recipe.task, recipe.data, recipe.seed, **chosen)
    if recipe.init_from is not None:
        _check_labels(task, recipe.init_from)
    return task, splits


def build_learner(recipe: Recipe, task: Task) -> Learner:
    """Load the base and put on it what the recipe trains.

    The first weights of a new head are drawn by the recipe's seed; those that it leaves as they are by a fixed one, so
    that all jobs on a base share them.
    """
    base, tokenizer = load_base(recipe, task)
    digest = tokenizer_digest(tokenizer)
    new = new_weights(base, recipe.base.model, recipe.base.revision)
    head = head_modules(base, recipe.task, new)
    if recipe.head == "last":
        frozen = set(before_last(name for name, _ in base.named_parameters() if name.startswith(_inside(head))))
        draw_weights(base, frozen.intersection(new), seed=0)
        new = [name for name in new if name not in frozen]
    draw_weights(base, new, recipe.seed)
    return Learner(apply_method(base, recipe, new), tokenizer, head, new, digest)


def load_base(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the task's head, in the number format that fits the hardware and the method, and its
    tokenizer.

    Raises `UserError` for a folder or hub name that cannot be read, and a `load_in` that does nothing to this model.
    """
    name, revision, load_in = recipe.base.model, recipe.base.revision, recipe.base.load_in
    precision = choose_precision(recipe.precision, recipe.base.dtype)
    if precision == "bf16":
        _warn_of_slow_bf16(recipe.base.dtype)
    if recipe.base.dtype == "auto":
        dtype: Any = torch.float32 if METHODS[recipe.method].own_weights or precision == "fp32" else "auto"
    elif recipe.base.dtype != "fp32" and precision == "fp32":
        raise UserError(f"base.dtype {recipe.base.dtype} needs a precision of 16 bits too: bf16, or fp16 on a GPU")
    else:
        dtype = DTYPES[recipe.base.dtype]
    with quiet():  # transformers' report of a head that is new is no news here
        tokenizer = load_tokenizer(name, revision=revision)
        options: dict[str, Any] = {DTYPE_ARGUMENT: dtype}
        if load_in is not None:
            empty = task.load_model(name, tokenizer, revision=revision, device_map="meta")
            head = head_modules(empty, recipe.task, new_weights(empty, name, revision))
            options["quantization_config"] = quantization_config(load_in, head, DTYPES[precision])
        model = task.load_model(name, tokenizer, revision=revision, **options)
    if load_in is not None and not quantised_weights(model):
        raise UserError(
            f"base.load_in {load_in} changes no weight of {type(model).__name__}: choose another of "
            f"{', '.join(QUANTISERS)}, or leave it out"
        )
    leave_unpacked(model)  # for every method, and a loaded run scores as it did in training
    return model, tokenizer


def _warn_of_slow_bf16(dtype: str) -> None:
    """Say it before the first step where steps would take minutes instead of seconds. `dtype`: of the base."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and (times := bf16_slowdown()) > SLOW_BF16:
        fields = "precision and base.dtype" if dtype == "bf16" else "precision"
        why = "this CPU, which has no instructions for it"
        log_main(f"bf16 takes {times:.0f} times as long as fp32 on {why}: set {fields} to fp32")


def _inside(modules: list[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)


def prepare(recipe: Recipe, folder: Path, task: Task, splits: dict[str, Dataset], learner: Learner) -> Run:
    """Encode the rows and make the Trainer, which measures the units of RED. Nothing is written."""
    tokenizer = learner.tokenizer
    found = encode_splits(recipe, task, splits, learner.model, tokenizer)
    encoded = {name: each.rows if name == "train" else by_length(each.rows) for name, each in found.items()}
    rows_cut = {name: sum(each.cut) for name, each in found.items()}
    rows_left_out = {name: each.left_out for name, each in found.items()}
    notes = [each.note for each in found.values() if each.note]
    trainer = make_trainer(recipe, folder, task, learner.model, tokenizer, encoded, learner.head)
    if "test" in encoded:
        encoded["test"] = as_evaluated(trainer, encoded["test"])
    return Run(recipe, folder, task, splits, encoded, rows_cut, rows_left_out, notes, learner, trainer)


def _check_labels(task: Task, init_from: str) -> None:
    """Raises `UserError` where the run that an adapter comes from learned other labels: its head would answer those.

    An adapter that was taken out of its run does not say what its labels are.
    """
    saved = find_run(init_from) / TASK
    if not saved.is_file():
        if getattr(task, "label_names", None):
            log_main(
                f"{init_from} is not in a run folder: its head is assumed to have this data's labels, in their order"
            )
        return
    before, now = read_json(saved), task.to_dict()
    for key in ("task", "problem_type", "label_names"):
        if before.get(key) != now.get(key):
            there, here = (textwrap.shorten(str(each.get(key)), 200) for each in (before, now))
            raise UserError(f"init_from: {key} is {there} in {init_from} and {here} here, so its head does not fit")


def best_evaluation(state: Any) -> dict[str, Any]:
    """The scores on the validation split at the best epoch, as result.json has them, from a Trainer's state."""
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    best = next((entry for entry in evaluations if entry["step"] == state.best_global_step), evaluations[-1])
    return {"best_epoch": best["epoch"], "validation": plain_scores(best, "eval_")}


def plain_scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        key.removeprefix(prefix): value
        for key, value in metrics.items()
        if key.startswith(prefix) and not key.endswith(TIMES)
    }


def save_model(
    model: PreTrainedModel | PeftModel,
    learner: Learner,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter/ or model/ into a run folder. `state`: the tensors, where the model itself holds only a part of
    them. The tokenizer comes along with a whole model, and otherwise where it is
    not the base's any more."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = len(trained) == len(list(model.parameters()))
    with replaced_folder(folder / (ADAPTER if isinstance(model, PeftModel) else MODEL)) as target:
        if isinstance(model, PeftModel) or whole:
            model.save_pretrained(target, state_dict=state)
        else:  # what was trained, to be put into the base model
            tensors = {name: tensor for name, tensor in (state or model.state_dict()).items() if name in trained}
            model.config.save_pretrained(target)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / TRAINED)
        if whole or tokenizer_digest(learner.tokenizer) != learner.digest:
            learner.tokenizer.save_pretrained(target)


def _describe(run: Run) -> dict[str, Any]:
    """What result.json holds beside scores and times."""
    recipe, model, state = run.recipe, run.trainer.model, run.trainer.state
    saved = run.folder / ADAPTER if (run.folder / ADAPTER).is_dir() else run.folder / MODEL
    return {
        "task": recipe.task,
        "base": recipe.base.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "metric": run.task.metric,
        "learning_rate": recipe.learning_rate,
        "steps": state.global_step,
        "epochs": state.epoch,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_parameters": sum(p.numel() for p in head_parameters(model, run.learner.head).values()),
        "adapter_bytes": sum(path.stat().st_size for path in saved.glob("*.safetensors")),
        "versions": {module.__name__: module.__version__ for module in (redpeft, peft, transformers, torch)},
    }


def _write_card(run: Run, result: dict[str, Any]) -> None:
    """The adapter's model card."""
    if (run.folder / ADAPTER).is_dir():
        metrics = {
            f"{split} {name}": value
            for split in ("validation", "test")
            for name, value in (result[split] or {}).items()
            if isinstance(value, float)
        }
        write_card(
            run.folder / ADAPTER,
            task=run.recipe.task,
            metrics=metrics,
            labels=getattr(run.task, "label_names", None),
            recipe=run.recipe.model_dump(mode="json"),
        )

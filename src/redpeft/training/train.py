"""One job: a recipe with one seed becomes a run folder with a trained adapter."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import set_seed

import redpeft
from redpeft.adapters.card import write_card
from redpeft.adapters.files import ADAPTER, RECIPE, TASK, find_adapter, find_run, read_adapter, write_atomically
from redpeft.errors import UserError
from redpeft.tasks import TASKS, Task, read_splits
from redpeft.tasks.base_model import require_folder
from redpeft.training.base import load_base, new_weights, precision, require_quantiser
from redpeft.training.generating import answer_scores
from redpeft.training.loop import (
    TIMES,
    RunCallback,
    attach,
    bars_on_terminals_only,
    checkpoint_state,
    last_checkpoint,
    say,
    stop_on_sigterm,
    to_json,
)
from redpeft.training.methods import apply_method, check_options, head_modules, head_parameters
from redpeft.training.plots import plot_run
from redpeft.training.recipe import Recipe
from redpeft.training.run_folder import (
    CHECKPOINTS,
    MODEL,
    RESULT,
    TRAINED,
    finished,
    locked,
    naming_a_full_disk,
    read_result,
    tidy,
)
from redpeft.training.trainer import check_reporters, make_trainer, rows_at_once, trainer_classes


def train(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Train one seed of a recipe in `folder` and return what is written to its result.json.

    That is: scores by split (`validation` at the best epoch, `test` or None), `metric`, `best_epoch`, `steps`,
    `epochs`, `seconds` and the median `seconds_per_step` (of the process that came to the end), parameter counts,
    `rows` by split, `adapter_bytes`, `versions`, and what the recipe says of task, base, method, seed and rate.

    A finished run is not repeated, an unfinished one goes on from its last checkpoint. Raises `UserError`, with
    nothing written, for wrong input or a folder of another recipe, and `RunError`, with the last checkpoint kept, for
    a loss that is not finite, a full disk, or SIGTERM.
    """
    recipe, folder = recipe.resolved().model_copy(update={"seeds": None, "output": None}), Path(folder)
    result = finished(recipe, folder)
    if result is None:
        _check(recipe)
        with locked(folder):
            result = finished(recipe, folder) or _train(recipe, folder)  # another process may just have done it
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # also what a kill in the last moment left
    return result


def _check(recipe: Recipe) -> None:
    """Raises `UserError` for what can be seen to be wrong in a recipe before anything is read or loaded."""
    require_folder(recipe.base.model)
    rows_at_once(recipe)
    precision(recipe)
    require_quantiser(recipe)
    check_options(recipe)
    check_reporters(recipe)
    trainer_classes(recipe)
    if recipe.init_from is not None:
        read_adapter(find_adapter(recipe.init_from))


def _train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    bars_on_terminals_only()
    splits = read_splits(recipe.data, recipe.seed)
    chosen = {key: value for key in ("problem_type", "metric") if (value := getattr(recipe, key)) is not None}
    task = TASKS[recipe.task].from_splits(splits, recipe.data, **chosen)
    say(f"columns: {', '.join(f'{key} = {value}' for key, value in task.columns.items())}")
    if recipe.init_from is not None:
        _check_labels(task, recipe.init_from)

    set_seed(recipe.seed)  # the head's first weights
    base, tokenizer = load_base(recipe, task)
    new = new_weights(base, recipe)
    head = head_modules(base, recipe.task, new)
    model = apply_method(base, recipe, new)
    encoded = {name: task.encode(split, tokenizer, recipe.max_length) for name, split in splits.items()}
    encoded |= {name: _by_length(encoded[name]) for name in encoded if name != "train"}
    trainer = make_trainer(recipe, folder, task, model, tokenizer, encoded, head)
    callback = attach(trainer, folder, recipe.save_steps)

    with naming_a_full_disk(folder):
        if trainer.is_world_process_zero():
            recipe.save(folder / RECIPE)
            write_atomically(folder / TASK, to_json(task.to_dict(), indent=2))
            tidy(folder / CHECKPOINTS)
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with stop_on_sigterm(trainer):
            trainer.train(resume_from_checkpoint=_checkpoint(trainer, folder))
        seconds = time.perf_counter() - start
        scores = _scores(trainer, encoded)
        if scores["test"]:
            scores["test"] |= answer_scores(trainer, task, splits["test"], recipe.max_length)
        _save_model(trainer, folder)
        if trainer.is_world_process_zero():
            result = _describe(recipe, task, trainer, callback, head, folder) | scores | {"seconds": round(seconds, 3)}
            result["rows"] = {name: len(split) for name, split in splits.items()}
            _write_pages(recipe, task, trainer, folder, result)
            write_atomically(folder / RESULT, to_json(result, indent=2))
        trainer.accelerator.wait_for_everyone()
    return read_result(folder)


def _check_labels(task: Task, init_from: str) -> None:
    """Raises `UserError` where the run that an adapter comes from learned other labels: its head would answer those.

    An adapter that was taken out of its run does not say what its labels are.
    """
    saved = find_run(init_from) / TASK
    if not saved.is_file():
        if getattr(task, "label_names", None):
            say(f"{init_from} lies in no run folder: its head is taken for the labels of this data, in their order")
        return
    before, now = json.loads(saved.read_text(encoding="utf-8")), task.to_dict()
    for key in ("task", "problem_type", "label_names"):
        if before.get(key) != now.get(key):
            there, here = (textwrap.shorten(str(each.get(key)), 200) for each in (before, now))
            raise UserError(f"init_from: {key} is {there} in {init_from} and {here} here, so its head does not fit")


def _by_length(dataset: Dataset) -> Dataset:
    """The longest rows first: scored in batches of like length, with less padding. Their order changes no score."""
    if "input_ids" not in dataset.column_names:  # TRL tokenises itself
        return dataset
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))


def _checkpoint(trainer: Any, folder: Path) -> str | None:
    """The checkpoint to go on from. A run that early stopping had ended is told to do no more steps."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        return None
    state = checkpoint_state(checkpoint) or {}
    say(f"going on from step {state['global_step']}")
    if state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
        trainer.args.max_steps = state["global_step"]
    return str(checkpoint)


def _scores(trainer: Any, encoded: dict[str, Dataset]) -> dict[str, Any]:
    """The best evaluation on the validation split, and the test split's scores with the model of that moment."""
    state = trainer.state
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    best = next((entry for entry in evaluations if entry["step"] == state.best_global_step), evaluations[-1])
    scores = {"best_epoch": best["epoch"], "validation": plain_scores(best, "eval_"), "test": None}
    if "test" in encoded:
        scores["test"] = plain_scores(trainer.evaluate(encoded["test"], metric_key_prefix="test"), "test_")
    return scores


def plain_scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        key.removeprefix(prefix): value
        for key, value in metrics.items()
        if key.startswith(prefix) and not key.endswith(TIMES)
    }


def _save_model(trainer: Any, folder: Path) -> None:
    """Write adapter/ or model/ under a temporary name, then rename it."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    target = folder / (ADAPTER if isinstance(model, PeftModel) else MODEL)
    temporary = target.with_name(target.name + ".partial")
    for path in (temporary, target):
        shutil.rmtree(path, ignore_errors=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(model, PeftModel) or len(trained) == len(list(model.parameters())):
        model.save_pretrained(temporary, state_dict=state)
    else:  # what was trained, to be put into the base model
        tensors = {name: tensor for name, tensor in (state or model.state_dict()).items() if name in trained}
        model.config.save_pretrained(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TRAINED)
    trainer.processing_class.save_pretrained(temporary)
    os.replace(temporary, target)


def _describe(
    recipe: Recipe, task: Task, trainer: Any, callback: RunCallback, head: list[str], folder: Path
) -> dict[str, Any]:
    """What result.json holds beside the scores."""
    model = trainer.model
    saved = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder / MODEL
    step = callback.seconds_per_step()
    return {
        "task": recipe.task,
        "base": recipe.base.model,
        "method": recipe.method,
        "seed": recipe.seed,
        "metric": task.metric,
        "learning_rate": recipe.learning_rate,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds_per_step": step and round(step, 5),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_parameters": sum(p.numel() for p in head_parameters(model, head).values()),
        "adapter_bytes": sum(path.stat().st_size for path in saved.glob("*.safetensors")),
        "versions": {module.__name__: module.__version__ for module in (redpeft, peft, transformers, torch)},
    }


def _write_pages(recipe: Recipe, task: Task, trainer: Any, folder: Path, result: dict[str, Any]) -> None:
    """The pictures, and the adapter's model card."""
    plot_run(trainer.state.log_history, task.metric, folder / "plots")
    if (folder / ADAPTER).is_dir():
        metrics = {
            f"{split} {name}": value
            for split in ("validation", "test")
            for name, value in (result[split] or {}).items()
            if isinstance(value, float)
        }
        write_card(
            folder / ADAPTER,
            task=recipe.task,
            metrics=metrics,
            labels=getattr(task, "label_names", None),
            recipe=recipe.model_dump(mode="json"),
        )

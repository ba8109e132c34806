"""One job: a recipe with one seed becomes a run folder with a trained adapter.

recipe.yaml     the resolved recipe
task.json       columns, labels and metric, so that the run can be used without its training data
adapter/        PEFT's folder with tokenizer and model card; model/ for the methods that are not PEFT's
metrics.jsonl   one line for each log and evaluation
plots/          loss and metric
result.json     written last: the run is finished
checkpoints/    while it is not
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

import redpeft
from redpeft import calibrate
from redpeft.adapters.card import write_card
from redpeft.errors import RunError, UserError
from redpeft.tasks import TASKS, Task, read_splits
from redpeft.training.base import autocast, load_base, new_weights, precision
from redpeft.training.loop import (
    CHECKPOINT_STATE,
    TIMES,
    EpochOrder,
    RunCallback,
    RunTrainer,
    attach,
    checkpoint_state,
    last_checkpoint,
    say,
    stop_on_sigterm,
    to_json,
)
from redpeft.training.methods import apply_method, head_modules, head_parameters
from redpeft.training.plots import plot_run
from redpeft.training.recipe import Recipe, load_recipe

CALIBRATION_ROWS = 32
RECIPE, TASK, RESULT, CHECKPOINTS = "recipe.yaml", "task.json", "result.json", "checkpoints"
ADAPTER, MODEL, TRAINED = "adapter", "model", "trained.safetensors"


def train(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Train one seed of a recipe in `folder` and return what is written to its result.json.

    That is: scores by split (`validation` at the best epoch, `test` or None), `metric`, `best_epoch`, `steps`,
    `epochs`, `seconds` and the median `seconds_per_step` (of the process that came to the end), parameter counts,
    `adapter_bytes`, `versions`, and what the recipe says of task, base, method, seed and learning rate.

    A finished run is not repeated, an unfinished one goes on from its last checkpoint. Raises `UserError`, with
    nothing written, for wrong input or a folder of another recipe, and `RunError`, with the last checkpoint kept, for
    a loss that is not finite, a full disk, or SIGTERM.
    """
    recipe, folder = recipe.resolved().model_copy(update={"seeds": None, "output": None}), Path(folder)
    if (result := finished(recipe, folder)) is not None:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # left by a kill in the last moment
        return result
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

    splits = read_splits(recipe.data, recipe.seed)
    chosen = {key: value for key in ("problem_type", "metric") if (value := getattr(recipe, key)) is not None}
    task = TASKS[recipe.task].from_splits(splits, recipe.data, **chosen)
    say(f"columns: {', '.join(f'{key} = {value}' for key, value in task.columns.items())}")

    set_seed(recipe.seed)  # the head's first weights
    base, tokenizer = load_base(recipe, task)
    new = new_weights(base, recipe)
    head = head_modules(base, recipe.task, new)
    model = apply_method(base, recipe, new)
    encoded = {name: task.encode(split, tokenizer, recipe.max_length) for name, split in splits.items()}
    encoded |= {name: _by_length(encoded[name]) for name in encoded if name != "train"}
    trainer = _make_trainer(recipe, folder, task, model, tokenizer, encoded, head)
    callback = attach(trainer, folder, recipe.save_steps)

    with _full_disk(folder):
        if trainer.is_world_process_zero():
            recipe.save(folder / RECIPE)
            write_atomically(folder / TASK, to_json(task.to_dict(), indent=2))
            _tidy(folder / CHECKPOINTS)
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with stop_on_sigterm(trainer):
            trainer.train(resume_from_checkpoint=_checkpoint(trainer, folder))
        seconds = time.perf_counter() - start
        scores = _scores(trainer, encoded)
        _save_model(trainer, folder)
        if trainer.is_world_process_zero():
            result = _describe(recipe, task, trainer, callback, head, folder) | scores | {"seconds": round(seconds, 3)}
            _write_pages(recipe, task, trainer, folder, result)
            write_atomically(folder / RESULT, to_json(result, indent=2))
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return read_result(folder)


def finished(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The result that `folder` holds for this recipe; None where there is work to do.

    Raises `UserError` for a folder of another recipe, or of something else.
    """
    if (folder / RECIPE).is_file():
        if other := recipe.differences(load_recipe(folder / RECIPE)):
            raise UserError(
                f"{folder} holds a run of another recipe ({', '.join(other[:5])} differ): choose another output folder"
            )
        return read_result(folder) if (folder / RESULT).is_file() else None
    if folder.exists() and (not folder.is_dir() or any(path.name != CHECKPOINTS for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run: choose another output folder")
    return None


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run's result.json holds."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def write_atomically(path: Path, text: str) -> None:
    """Write a file by a temporary one and a rename, so that it is never seen half written."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _by_length(dataset: Dataset) -> Dataset:
    """The longest rows first: scored in batches of like length, with less padding. Their order changes no score."""
    if "input_ids" not in dataset.column_names:  # TRL tokenises itself
        return dataset
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))


def _make_trainer(
    recipe: Recipe,
    folder: Path,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Dataset],
    head: list[str],
) -> Any:
    trainer_class, arguments_class, extra = trainer_classes(recipe)
    args = arguments(recipe, folder, task, arguments_class, extra)
    collator = task.collator(tokenizer)
    callbacks: list[TrainerCallback] = []
    if recipe.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping))
    if "tensorboard" in recipe.report_to and args.process_index == 0:
        callbacks.append(_tensorboard(folder))
    try:
        trainer = trainer_class(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            compute_metrics=task.compute_metrics,
            callbacks=callbacks,
        )
    except RuntimeError as error:
        if recipe.report_to and "installed" in str(error):  # transformers names the package to install
            raise UserError(f"report_to: {error}") from None
        raise
    if recipe.task != "instruction":
        # Trainer takes it from the signature that a model averages its loss over all the pieces of a batch, and
        # classifiers that do not would learn from the sum of the pieces' means.
        trainer.model_accepts_loss_kwargs = False
    rows = trainer.train_dataset
    if recipe.method == "red":
        with autocast(recipe, model.device):
            calibrate(model, _first_batch(trainer))
    lengths = [len(ids) for ids in rows["input_ids"]] if recipe.group_by_length else None
    trainer.order = EpochOrder(len(rows), recipe.batch_size, recipe.seed, lengths)
    trainer.head, trainer.head_lr = head_parameters(model, head).values(), recipe.head_lr
    return trainer


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """transformers' callback, writing beside the run and not into its checkpoints, which go when it is done."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("report_to tensorboard: pip install tensorboard") from None
    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))


def trainer_classes(recipe: Recipe) -> tuple[type, type, dict[str, Any]]:
    """The Trainer with what a run adds, its arguments' class, and arguments of its own."""
    if recipe.task != "instruction":
        return type("RunTrainer", (RunTrainer, Trainer), {}), TrainingArguments, {}
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError("the task instruction needs TRL: pip install redpeft[trl]") from None
    extra = {"max_length": recipe.max_length, "packing": recipe.packing, "eval_packing": False}
    return type("RunSFTTrainer", (RunTrainer, SFTTrainer), {}), SFTConfig, extra


def arguments(recipe: Recipe, folder: Path, task: Task, cls: type, extra: dict[str, Any]) -> TrainingArguments:
    known = {field.name for field in fields(cls)}
    kind = precision(recipe)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, rest = divmod(recipe.batch_size, processes * recipe.gradient_accumulation)
    if rest:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes} processes"
            + (f" in {recipe.gradient_accumulation} pieces each" if recipe.gradient_accumulation > 1 else "")
        )
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    extra[checkpointing] = recipe.gradient_checkpointing  # TRL's default is True
    if recipe.gradient_checkpointing:
        extra[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    args = cls(
        output_dir=str(folder / CHECKPOINTS),
        run_name=folder.name,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=max(rows, 8),
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=recipe.schedule,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        seed=recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,  # the latest; the best is kept beside it
        load_best_model_at_end=True,
        metric_for_best_model=task.metric,
        greater_is_better=task.greater_is_better,
        restore_callback_states_from_checkpoint=True,
        logging_steps=0.01,  # of all steps
        logging_nan_inf_filter=False,  # it would hide what RunTrainer stops at
        report_to=[name for name in recipe.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,  # loop.ProgressBar
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        **{"warmup_ratio" if "warmup_ratio" in known else "warmup_steps": recipe.warmup},
        **extra,
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs by torchrun or accelerate, never by DataParallel
    return args


def _first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """The first training rows in the data's order, whatever the seed and the number of processes."""
    rows = trainer._remove_unused_columns(trainer.train_dataset)
    rows = rows.select(range(min(CALIBRATION_ROWS, len(rows))))
    batch = trainer.data_collator(list(rows))
    return {key: value.to(trainer.model.device) for key, value in batch.items() if torch.is_tensor(value)}


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


def _tidy(checkpoints: Path) -> None:
    """Remove checkpoints that were cut short; find the best one again in a run folder that was moved."""
    for path in checkpoints.glob("checkpoint-*"):
        state = checkpoint_state(path)
        if state is None:
            shutil.rmtree(path)
        elif state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = str(checkpoints / Path(state["best_model_checkpoint"]).name)
            write_atomically(path / CHECKPOINT_STATE, json.dumps(state))


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Name a full disk as what it is, whichever library met it, and free what a checkpoint cut short takes."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RunError) or not _is_full_disk(error):
            raise
        _tidy(folder / CHECKPOINTS)
        raise RunError(
            f"the disk of {folder} is full: free some space and run the same command again to go on from the last "
            "checkpoint"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch.save wrap the operating system's error in their own words
    return any(words in str(error) for words in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))


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
    else:  # bitfit, head: what was trained, to be put into the base model
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

"""A recipe becomes transformers' Trainer, or TRL's: its arguments, its callbacks, its order of rows."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from redpeft import calibrate
from redpeft.errors import UserError
from redpeft.models import autocast, choose_precision
from redpeft.storage import CHECKPOINTS
from redpeft.tasks import TASKS, Task
from redpeft.training.baselines import head_parameters
from redpeft.training.callbacks import EpochOrder, RunTrainer
from redpeft.training.generating import GeneratingTrainer, metrics_function
from redpeft.training.recipe import Recipe

CALIBRATION_ROWS = 32


def make_trainer(
    recipe: Recipe,
    folder: Path,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Dataset],
    head: list[str],
) -> Any:
    """The Trainer of a run, with the units of RED measured: nothing is left to do but to train."""
    trainer_class, arguments_class, extra = trainer_classes(recipe)
    args = arguments(recipe, folder, task, arguments_class, extra)
    collator = task.collator(tokenizer)
    callbacks: list[TrainerCallback] = []
    if recipe.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping))
    if "tensorboard" in recipe.report_to and args.process_index == 0:
        callbacks.append(_tensorboard(folder))
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        compute_metrics=metrics_function(task, tokenizer),
        callbacks=callbacks,
    )
    if task.task_type != "CAUSAL_LM":
        # Trainer takes it from the signature that a model averages its loss over all the pieces of a batch, and
        # classifiers and T5, which do not, would learn from the sum of the pieces' means.
        trainer.model_accepts_loss_kwargs = False
    rows = trainer.train_dataset
    if recipe.method == "red":
        with autocast(choose_precision(recipe.precision, recipe.base.dtype), model.device):
            calibrate(model, _first_batch(trainer))
    lengths = [len(ids) for ids in rows["input_ids"]] if recipe.group_by_length else None
    trainer.order = EpochOrder(len(rows), recipe.batch_size, recipe.seed, lengths)
    trainer.head, trainer.head_lr = head_parameters(model, head).values(), recipe.head_lr
    return trainer


def as_evaluated(trainer: Any, rows: Dataset) -> Dataset:
    """Further rows as `trainer.evaluate` takes them: TRL's trainer tokenises those that it is made with."""
    if not hasattr(trainer, "_prepare_dataset"):
        return rows
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "test")


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """transformers' callback, writing beside the run and not into its checkpoints, which go when it is done."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))


def check_reporters(recipe: Recipe) -> None:
    """Raises `UserError` where the package of one of `report_to` is missing."""
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to {name}: pip install {name}")


def trainer_classes(recipe: Recipe) -> tuple[type, type, dict[str, Any]]:
    """The Trainer with what a run adds, its arguments' class, and arguments of its own."""
    if recipe.task != "instruction":
        generation = TASKS[recipe.task].generation
        if generation is None:
            return type("RunTrainer", (RunTrainer, Trainer), {}), TrainingArguments, {}
        run_trainer = type("RunGeneratingTrainer", (RunTrainer, GeneratingTrainer), {"generation": generation})
        return run_trainer, Seq2SeqTrainingArguments, {"predict_with_generate": True}
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError("the task instruction needs TRL: pip install redpeft[trl]") from None
    extra = {
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "eval_packing": False,
        "completion_only_loss": not recipe.learn_prompt,
    }
    return type("RunSFTTrainer", (RunTrainer, SFTTrainer), {}), SFTConfig, extra


def rows_at_once(recipe: Recipe) -> int:
    """The rows of a batch that one process computes at a time. UserError where they cannot be shared out evenly."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, rest = divmod(recipe.batch_size, processes * recipe.gradient_accumulation)
    if rest:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes} processes"
            + (f" in {recipe.gradient_accumulation} pieces each" if recipe.gradient_accumulation > 1 else "")
        )
    return rows


def arguments(recipe: Recipe, folder: Path, task: Task, cls: type, extra: dict[str, Any]) -> TrainingArguments:
    """The recipe in the words of `cls`, transformers' TrainingArguments or TRL's, with `extra` of its own."""
    known = {field.name for field in fields(cls)}
    kind = choose_precision(recipe.precision, recipe.base.dtype)
    rows = rows_at_once(recipe)
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
        **{"warmup_ratio" if recipe.warmup < 1 and "warmup_ratio" in known else "warmup_steps": recipe.warmup},
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

"""One job: a recipe with one seed becomes a run folder with a trained adapter."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from transformers import set_seed

import redpeft
from redpeft.adapters.card import write_card
from redpeft.adapters.folder import read_adapter
from redpeft.console import bars_on_terminals_only, log_main
from redpeft.errors import UserError, shorten_list
from redpeft.models import choose_precision, find_base, require_quantiser
from redpeft.plots import plot_run
from redpeft.storage import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    PLOTS,
    RECIPE,
    RESULT,
    TASK,
    checkpoint_state,
    clean_checkpoints,
    explaining_full_disk,
    find_adapter,
    find_run,
    last_checkpoint,
    locked,
    read_json,
    read_result,
    to_json,
    write_atomically,
)
from redpeft.tasks.base import TASKS, Task
from redpeft.tasks.data import read_data
from redpeft.training.callbacks import attach, plain_scores, stop_on_signals
from redpeft.training.encoding import by_length, encode_splits
from redpeft.training.learner import Learner, build_learner, check_options, head_parameters, save_model
from redpeft.training.recipe import Recipe
from redpeft.training.trainer import (
    RolloutFunction,
    answer_scores,
    as_evaluated,
    check_reporters,
    make_trainer,
    rows_at_once,
    trainer_classes,
)


def train(recipe: Recipe, folder: str | Path, rollout_func: RolloutFunction | None = None) -> dict[str, Any]:
    """Train one seed of a recipe in `folder` and return what is written to its result.json.

    That is: scores by split (`validation` at the best epoch, `test` or None), `metric`, `best_epoch`, `steps`,
    `epochs`, `seconds` and the median `seconds_per_step` (of the process that came to the end), parameter counts,
    `rows`, `rows_cut` (too long) and `rows_left_out` (nothing to learn) by split, `adapter_bytes`, `versions`, and
    what the recipe says of task, base, method, seed and rate. `rollout_func` gives the answers of the task reward, as
    TRL's GRPOTrainer asks for them.

    A finished run is not repeated, an unfinished one goes on from its last checkpoint. Raises `UserError`, with
    nothing written, for wrong input or a folder of another recipe, and `RunError`, with the last checkpoint kept, for
    a loss that is not finite, a full disk, or where it is told to stop (Ctrl-C, SIGTERM).
    """
    recipe, folder = recipe.alone(), Path(folder)
    result = recipe.result_in(folder)
    if result is None:
        check_recipe(recipe)
        check_rollouts(recipe, rollout_func)
        with locked(folder):
            # another process may have just finished it
            result = recipe.result_in(folder) or _train(recipe, folder, rollout_func)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # also after a kill in the last moment
    return result


def set_up(
    recipe: Recipe,
    folder: Path,
    say: Callable[[str], None] = log_main,
    rollout_func: RolloutFunction | None = None,
) -> tuple[TrainingRun, Any]:
    """A run with its data read, its model loaded and its rows encoded, and the Trainer that trains it.

    Nothing is written, but Trainer makes an empty folder in `folder`. `say` gets lines for people: what the columns
    are, how many rows each class has, how many were cut. Raises `UserError` for wrong input.
    """
    bars_on_terminals_only()
    task, splits = read_task(recipe)
    unread = task.unread(splits["train"])
    said = ", ".join(f"{key} = {value}" for key, value in task.columns.items())
    say(f"columns: {said}{'; not read: ' + shorten_list(unread, 8) if unread else ''}")
    for line in task.describe(splits["train"]):
        say(line)
    set_seed(recipe.seed)
    learner = build_learner(recipe, task)
    run = prepare(recipe, folder, task, splits, learner)
    for note in run.notes:
        say(note)
    trainer = make_trainer(
        recipe, folder, task, learner.model, learner.tokenizer, run.encoded, learner.head, rollout_func
    )
    return run, trainer


def _train(recipe: Recipe, folder: Path, rollout_func: RolloutFunction | None) -> dict[str, Any]:
    run, trainer = set_up(recipe, folder, rollout_func=rollout_func)
    callback = attach(trainer, folder, recipe.save_steps)
    with explaining_full_disk(folder):
        if trainer.is_world_process_zero():
            run.begin()
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with stop_on_signals(trainer):
            trainer.train(resume_from_checkpoint=_checkpoint(trainer, folder))
        seconds = time.perf_counter() - start
        scores = _scores(run, trainer)
        _save_model(run, trainer)
        if trainer.is_world_process_zero():
            step = callback.seconds_per_step()
            times = {"seconds": round(seconds, 3), "seconds_per_step": step and round(step, 5)}
            run.finish(trainer.state, scores, times)
        trainer.accelerator.wait_for_everyone()
    return read_result(folder)


def _checkpoint(trainer: Any, folder: Path) -> str | None:
    """The checkpoint to continue from. A run that early stopping had ended takes no more steps."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        return None
    state = checkpoint_state(checkpoint) or {}
    log_main(f"continuing from step {state['global_step']}")
    if state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
        trainer.args.max_steps = state["global_step"]
    return str(checkpoint)


def _scores(run: TrainingRun, trainer: Any) -> dict[str, Any]:
    """The best evaluation on the validation split, and the scores of that model on the test split."""
    scores = {**best_evaluation(trainer.state), "test": None}
    if "test" in run.encoded:
        metrics = trainer.evaluate(as_evaluated(trainer, run.encoded["test"]), metric_key_prefix="test")
        answers = answer_scores(trainer, run.task, run.splits["test"], run.recipe.max_length)
        scores["test"] = plain_scores(metrics, "test_") | answers
    return scores


def _save_model(run: TrainingRun, trainer: Any) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), run.learner, run.folder, state)


# --- a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready to train. `encoded` holds the splits as tokens; `rows_cut` and `rows_left_out` count the
    rows of each that were cut or left out for that, and `notes` tell people."""

    recipe: Recipe
    folder: Path
    task: Task
    splits: dict[str, Dataset]
    encoded: dict[str, Dataset]
    rows_cut: dict[str, int]
    rows_left_out: dict[str, int]
    notes: list[str]
    learner: Learner

    def begin(self) -> None:
        """Write what the run is about, and clear away what a killed process left half written."""
        self.recipe.save(self.folder / RECIPE)
        write_atomically(self.folder / TASK, to_json(self.task.to_dict(), indent=2))
        clean_checkpoints(self.folder / CHECKPOINTS)

    def finish(self, state: Any, scores: dict[str, Any], times: dict[str, Any], plots: bool = True) -> None:
        """Write the adapter's card and the pictures, and last the result: its presence says that the run is done.

        `state` is a Trainer's at the end of training.
        """
        result = _describe(self, state) | scores | times
        result["rows"] = {name: len(split) for name, split in self.splits.items()}
        result |= {"rows_cut": self.rows_cut, "rows_left_out": self.rows_left_out}
        if plots:
            plot_run(state.log_history, self.task.metric, self.folder / PLOTS, result["best_epoch"])
        _write_card(self, result)
        write_atomically(self.folder / RESULT, to_json(result, indent=2))


def check_recipe(recipe: Recipe) -> None:
    """Raises `UserError` for mistakes in a recipe that can be found before anything is read or loaded."""
    find_base(recipe.base.model)
    rows_at_once(recipe)
    choose_precision(recipe.precision, recipe.base.dtype)
    if recipe.base.load_in is not None:
        require_quantiser(recipe.base.load_in)
    check_options(recipe)
    check_reporters(recipe.report_to)
    trainer_classes(recipe)
    if recipe.init_from is not None:
        read_adapter(find_adapter(recipe.init_from))


def check_rollouts(recipe: Recipe, rollout_func: RolloutFunction | None) -> None:
    """Raises `UserError` if vLLM would answer with another policy than the one in training."""
    if recipe.method == "red" and recipe.trainer_options.get("use_vllm") and rollout_func is None:
        raise UserError(
            "trainer_options.use_vllm: TRL sends the merged weights to vLLM, which drops the biases that RED adds to "
            "layers without one; `redpeft train` has its own way, or give train(..., rollout_func=...)"
        )


def read_task(recipe: Recipe) -> tuple[Task, dict[str, Dataset]]:
    """The task of the recipe's data, and the data by split. Raises `UserError` for data that is missing or wrong."""
    recipe = recipe.resolved()
    fields = ("problem_type", "metric", "loss", "reward", "max_completion_length")
    chosen = {key: value for key in fields if (value := getattr(recipe, key)) is not None}
    task, splits = read_data(recipe.task, recipe.data, recipe.seed, **chosen)
    if recipe.init_from is not None:
        _check_labels(task, recipe.init_from)
    return task, splits


def _check_labels(task: Task, init_from: str) -> None:
    """Raises `UserError` if the run of `init_from` learned other labels: its head would answer those.

    For an adapter outside its run folder the labels are not known.
    """
    saved = find_run(init_from) / TASK
    if not saved.is_file():
        if task.head_labels:
            log_main(
                f"{init_from} is not in a run folder: its head is assumed to have this data's labels, in their order"
            )
        return
    before, now = read_json(saved), task.to_dict()
    same_kind = TASKS[before["task"]].task_type == task.task_type  # preferences continue a run of instructions
    for key in ("problem_type", "label_names") if same_kind else ("task",):
        if before.get(key) != now.get(key):
            there, here = (textwrap.shorten(str(each.get(key)), 200) for each in (before, now))
            raise UserError(f"init_from: {key} is {there} in {init_from} and {here} here, so its head does not fit")


def prepare(recipe: Recipe, folder: Path, task: Task, splits: dict[str, Dataset], learner: Learner) -> TrainingRun:
    """Encode the rows. Nothing is written."""
    found = encode_splits(
        task, splits, learner.model, learner.tokenizer, recipe.max_length, recipe.learn_prompt, recipe.seed
    )
    encoded = {name: each.rows if name == "train" else by_length(each.rows) for name, each in found.items()}
    rows_cut = {name: sum(each.cut) for name, each in found.items()}
    rows_left_out = {name: each.left_out for name, each in found.items()}
    notes = [each.note for each in found.values() if each.note]
    return TrainingRun(recipe, folder, task, splits, encoded, rows_cut, rows_left_out, notes, learner)


# --- the result -----------------------------------------------------------------------------------------------------


def best_evaluation(state: Any) -> dict[str, Any]:
    """The scores on the validation split at the best epoch, as result.json has them, from a Trainer's state."""
    evaluations = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    best = next((entry for entry in evaluations if entry["step"] == state.best_global_step), evaluations[-1])
    return {"best_epoch": best["epoch"], "validation": plain_scores(best, "eval_")}


def _describe(run: TrainingRun, state: Any) -> dict[str, Any]:
    """What result.json holds beside scores and times."""
    recipe, model = run.recipe, run.learner.model
    saved = run.folder / ADAPTER if (run.folder / ADAPTER).is_dir() else run.folder / MODEL
    return {
        "task": recipe.task,
        "base": recipe.base.model,
        "base_dequantised_from": getattr(model.config, "dequantised_from", None),
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


def _write_card(run: TrainingRun, result: dict[str, Any]) -> None:
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
            labels=list(run.task.head_labels) or None,
            recipe=run.recipe.model_dump(mode="json"),
        )

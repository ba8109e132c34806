"""One job: a recipe with one seed becomes a run folder with a trained adapter."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from redpeft.console import log_main
from redpeft.errors import some
from redpeft.storage import CHECKPOINTS, checkpoint_state, explaining_full_disk, last_checkpoint, locked, read_result
from redpeft.tasks.columns import unread_columns
from redpeft.training.callbacks import attach, bars_on_terminals_only, stop_on_signals
from redpeft.training.generating import answer_scores
from redpeft.training.recipe import Recipe
from redpeft.training.run import Run, best_evaluation, build_learner, check_recipe, plain_scores, prepare, read_task
from redpeft.training.run import save_model as save


def train(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Train one seed of a recipe in `folder` and return what is written to its result.json.

    That is: scores by split (`validation` at the best epoch, `test` or None), `metric`, `best_epoch`, `steps`,
    `epochs`, `seconds` and the median `seconds_per_step` (of the process that came to the end), parameter counts,
    `rows`, `rows_cut` (too long) and `rows_left_out` (nothing to learn) by split, `adapter_bytes`, `versions`, and
    what the recipe says of task, base, method, seed and rate.

    A finished run is not repeated, an unfinished one goes on from its last checkpoint. Raises `UserError`, with
    nothing written, for wrong input or a folder of another recipe, and `RunError`, with the last checkpoint kept, for
    a loss that is not finite, a full disk, or where it is told to stop (Ctrl-C, SIGTERM).
    """
    recipe, folder = recipe.alone(), Path(folder)
    result = recipe.result_in(folder)
    if result is None:
        check_recipe(recipe)
        with locked(folder):
            result = recipe.result_in(folder) or _train(recipe, folder)  # another process may just have done it
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # also what a kill in the last moment left
    return result


def _train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    bars_on_terminals_only()
    task, splits = read_task(recipe)
    unread = unread_columns(splits["train"], task.columns)
    said = ", ".join(f"{key} = {value}" for key, value in task.columns.items())
    log_main(f"columns: {said}{'; not read: ' + some(unread, 8) if unread else ''}")
    for line in task.describe(splits["train"]):
        log_main(line)
    set_seed(recipe.seed)
    run = prepare(recipe, folder, task, splits, build_learner(recipe, task))
    for note in run.notes:
        log_main(note)
    trainer = run.trainer
    callback = attach(trainer, folder, recipe.save_steps)
    with explaining_full_disk(folder):
        if trainer.is_world_process_zero():
            run.begin()
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with stop_on_signals(trainer):
            trainer.train(resume_from_checkpoint=_checkpoint(trainer, folder))
        seconds = time.perf_counter() - start
        scores = _scores(run)
        _save_model(run)
        if trainer.is_world_process_zero():
            step = callback.seconds_per_step()
            run.finish(scores, {"seconds": round(seconds, 3), "seconds_per_step": step and round(step, 5)})
        trainer.accelerator.wait_for_everyone()
    return read_result(folder)


def _checkpoint(trainer: Any, folder: Path) -> str | None:
    """The checkpoint to go on from. A run that early stopping had ended is told to do no more steps."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        return None
    state = checkpoint_state(checkpoint) or {}
    log_main(f"continuing from step {state['global_step']}")
    if state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
        trainer.args.max_steps = state["global_step"]
    return str(checkpoint)


def _scores(run: Run) -> dict[str, Any]:
    """The best evaluation on the validation split, and the test split's scores with the model of that moment."""
    scores = {**best_evaluation(run.trainer.state), "test": None}
    if "test" in run.encoded:
        metrics = run.trainer.evaluate(run.encoded["test"], metric_key_prefix="test")
        answers = answer_scores(run.trainer, run.recipe, run.task, run.splits["test"])
        scores["test"] = plain_scores(metrics, "test_") | answers
    return scores


def _save_model(run: Run) -> None:
    trainer = run.trainer
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        save(trainer.accelerator.unwrap_model(trainer.model), run.learner, run.folder, state)

"""A run folder: what lies in it, whether the run is finished, and who may write into it.

recipe.yaml     the resolved recipe
task.json       columns, labels and metric, so that the run can be used without its training data
adapter/        PEFT's folder with model card, and with the tokenizer where that is not the base's; model/ for the
                methods that are not PEFT's
metrics.jsonl   one line for each log and evaluation
plots/          loss and metric
result.json     written last: the run is finished
checkpoints/    while it is not
.lock           while a process is at work in it
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from redpeft.adapters.files import MODEL as MODEL
from redpeft.adapters.files import RECIPE, RESULT, TASK, write_atomically
from redpeft.errors import RunError, UserError
from redpeft.training.callbacks import CHECKPOINT_STATE, checkpoint_state, is_first_process
from redpeft.training.recipe import Recipe, load_recipe

CHECKPOINTS, LOCK, TRAINED = "checkpoints", ".lock", "trained.safetensors"


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
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {CHECKPOINTS, LOCK}):
        raise UserError(f"{folder} is not empty and holds no run: choose another output folder")
    if (folder.parent / TASK).is_file():
        raise UserError(f"{folder} would lie inside the run folder {folder.parent}: choose another output folder")
    return None


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run's result.json holds."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """While inside, no other command writes into `folder`, or what else in it `name` is the lock of; the processes of
    one distributed run share the lock.

    The operating system holds the lock and drops it with its process, however that ends, so a `.lock` left by a kill
    locks nobody out. Folders made for the lock alone are removed. Raises `UserError` where another process holds it,
    or the folder cannot be written.
    """
    if not is_first_process():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / name, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes it at the release
            (folder / name).unlink()
        lock.release()
        with suppress(OSError):  # not empty: the run has begun
            for path in made:
                path.rmdir()


def tidy(checkpoints: Path) -> None:
    """Remove checkpoints that were cut short; find the best one again in a run folder that was moved."""
    for path in checkpoints.glob("checkpoint-*"):
        state = checkpoint_state(path)
        if state is None:
            shutil.rmtree(path)
        elif state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = str(checkpoints / Path(state["best_model_checkpoint"]).name)
            write_atomically(path / CHECKPOINT_STATE, json.dumps(state))


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Name a full disk as what it is, whichever library met it, and free what a checkpoint cut short takes."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RunError) or not _is_full_disk(error):
            raise
        tidy(folder / CHECKPOINTS)
        raise RunError(
            f"the disk of {folder} is full: free some space and run the same command again to go on from the last "
            "checkpoint"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch.save wrap the operating system's error in their own words
    return any(words in str(error) for words in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))

"""Files and folders: what lies in a run folder, writes that are never seen half done, locks, and safe paths.

A run folder:

    recipe.yaml     the resolved recipe
    task.json       columns, labels and metric, so that the run can be used without its training data
    adapter/        PEFT's folder with a model card, and with the tokenizer where that is not the base's;
                    model/ for the methods that are not PEFT's
    metrics.jsonl   one line for each log entry and evaluation
    plots/          the loss and the metric
    result.json     written last: the run is finished
    checkpoints/    while it is not
    .lock           while a process works in it

An adapter folder has PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from redpeft.console import is_first_process
from redpeft.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    import torch

# --- names ----------------------------------------------------------------------------------------------------------

RECIPE, TASK, RESULT, METRICS, PLOTS = "recipe.yaml", "task.json", "result.json", "metrics.jsonl", "plots"
ADAPTER, MODEL, CHECKPOINTS, LOCK = "adapter", "model", "checkpoints", ".lock"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
TRAINED = "trained.safetensors"  # in model/: the weights that were trained, where those are not all
CHECKPOINT_STATE = "trainer_state.json"  # in a checkpoint, written last


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that `path` means: itself, or `adapter/` inside a run folder."""
    path = Path(path)
    inside = path / ADAPTER
    return inside if (inside / CONFIG_NAME).is_file() and not (path / CONFIG_NAME).is_file() else path


def find_run(path: str | Path) -> Path:
    """The run folder that `path` means: itself, or the one around its `adapter/`."""
    path = Path(path)
    return path.parent if path.name == ADAPTER and (path.parent / RECIPE).is_file() else path


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run."""
    return read_json(folder / RESULT)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint in a checkpoints/ folder."""
    complete = [path for path in folder.glob("checkpoint-*") if checkpoint_state(path) is not None]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def checkpoint_state(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state in a checkpoint. None where it is missing or was cut short."""
    try:
        return read_json(checkpoint / CHECKPOINT_STATE)
    except (OSError, ValueError):
        return None


def clean_checkpoints(folder: Path) -> None:
    """Remove checkpoints that were cut short. In a run folder that was moved, correct the path of the best one."""
    for path in folder.glob("checkpoint-*"):
        state = checkpoint_state(path)
        if state is None:
            shutil.rmtree(path)
        elif state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = str(folder / Path(state["best_model_checkpoint"]).name)
            write_atomically(path / CHECKPOINT_STATE, json.dumps(state))


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null: NaN is not JSON."""
    return json.dumps(finite(values), indent=indent, ensure_ascii=False)


def finite(value: Any) -> Any:
    """A value for JSON, in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: finite(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_metrics(folder: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Begin the metrics.jsonl of a run folder with these entries."""
    (folder / METRICS).write_text("".join(f"{to_json(entry)}\n" for entry in entries), encoding="utf-8")


def append_metrics(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to the metrics.jsonl of a run folder."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(f"{to_json(entry)}\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries in the metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


# --- writing --------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a text and a line end, under a temporary name that is then changed: nobody sees the file half written."""
    with _replaced_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file as `write_atomically` writes a text."""
    from safetensors.torch import save_file

    with _replaced_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(default_mode(path.parent))


@contextmanager
def _replaced_file(path: Path) -> Iterator[Path]:
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `path` at the end and is removed after an error.

    Raises `UserError` for a `path` that exists and is not an empty folder, that another process is writing, or that
    cannot be written.
    """
    final = path.resolve()
    temporary = temporary_path(final)
    try:
        if not (parent := next(parent for parent in final.parents if parent.exists())).is_dir():
            raise UserError(f"cannot write {path}: {parent} is not a folder")
        final.parent.mkdir(parents=True, exist_ok=True)
        with _held(final.with_name(f".{final.name}.lock")):
            try:
                if final.exists() and not (final.is_dir() and not any(final.iterdir())):
                    raise UserError(f"{path} exists already and is not an empty folder: choose another, or remove it")
                temporary.mkdir()
                yield temporary
                set_default_modes(temporary)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except Timeout:
        raise UserError(f"another process is writing {path}: wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or first_line(error)}") from error


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `path` at the end, in a folder that is `locked`. What was there
    is removed first, and so is what a killed process left."""
    temporary = path.with_name(f"{path.name}.partial")
    for each in (temporary, path):
        shutil.rmtree(each, ignore_errors=True)
    yield temporary
    set_default_modes(temporary)
    os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """A name beside `path` for what becomes `path` when it is whole. The name is random, so nothing is overwritten."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def set_default_modes(folder: Path) -> None:
    """Give all files below a folder the permissions that a new file has there: safetensors makes files that only their
    owner can read."""
    mode = default_mode(folder)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def default_mode(folder: Path) -> int:
    """The permissions of a new file in a folder, read from one: to read the umask is to change it, for all threads."""
    example = temporary_path(folder / ".mode")
    try:
        example.touch()
        return example.stat().st_mode & 0o777
    finally:
        example.unlink(missing_ok=True)


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, whichever library raised it, into a `RunError` that says so. Checkpoints of this
    run folder that were cut short are removed, which frees some space."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RunError) or not _is_full_disk(error):
            raise
        clean_checkpoints(folder / CHECKPOINTS)
        raise RunError(
            f"the disk of {folder} is full: free some space and run the same command again to continue from the last "
            "checkpoint"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch.save put the operating system's error into their own words
    return any(words in str(error) for words in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))


# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """While inside, no other command writes into `folder`, or into what else `name` is the lock of. The processes of
    one distributed run share the lock.

    Folders that were made for the lock alone are removed. Raises `UserError` where another process holds the lock, or
    the folder cannot be written.
    """
    if not is_first_process():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    held = _held(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.__enter__()
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        held.__exit__(None, None, None)
        with suppress(OSError):  # not empty: the run has begun
            for path in made:
                path.rmdir()


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock of a file while inside. Raises `Timeout` where another process holds it.

    The operating system drops the lock with its process, however that ends: a file that a kill left locks nobody out.
    """
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes it at the release
                path.unlink()


# --- paths ----------------------------------------------------------------------------------------------------------


def escapes_root(path: str) -> bool:
    """Whether a relative path that a file gives would lie outside the folder that it is relative to."""
    return bool(Path(path).anchor) or ".." in Path(path).parts or "\0" in path


def is_below(path: Path, root: Path) -> bool:
    """Whether `path` lies below `root` when all links are followed."""
    return path.resolve().is_relative_to(root.resolve())


def is_local(path: str) -> bool:
    """Whether a name that may be one on the Hub is meant as a path: it exists or looks like a file's, or it cannot be
    a name on the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return True
    parts = Path(path).parts
    looks_like_file = re.search(r"\.[A-Za-z]{2,8}\d?$", path) is not None
    return Path(path).expanduser().exists() or looks_like_file or (len(parts) == 2 and Path(parts[0]).is_dir())

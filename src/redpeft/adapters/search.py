"""What lies below a folder: adapters, and the runs that they came out of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from redpeft.errors import UserError
from redpeft.storage import ADAPTER, CONFIG_NAME, MODEL, RECIPE, RESULT, TASK


@dataclass(frozen=True)
class Found:
    """An adapter folder, which an unfinished or damaged run may lack yet, and the run folder around it, if any."""

    name: str  # its path below the folder that was searched, without a trailing /adapter
    adapter: Path
    run: Path | None

    @property
    def unfinished(self) -> bool:
        return self.run is not None and not (self.run / RESULT).is_file()


def find_adapters(root: Path) -> list[Found]:
    """Every adapter folder below `root`, or that `root` is, and every run that should have one; sorted by name.

    Runs of methods that leave a model and no adapter are passed over, and so are links to folders, hidden folders and
    what is being written (`.partial`). `UserError`: no such folder, or nothing there.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    found, _ = look_below(root)
    if not found:
        raise UserError(f"{root}: no adapters there")
    return found


def look_below(root: Path, name: str | None = None) -> tuple[list[Found], list[Path]]:
    """What `find_adapters` finds, and the folders that were looked into. With a `name`, only the adapter of that name:
    it is found by the same rules, and only the folders on the way to it are looked into."""
    found, seen = [], []
    way = PurePath(name or "", ADAPTER).parts
    for path, folders, files in _walk(root):
        seen.append(path)
        is_run = RECIPE in files and TASK in files
        if is_run:
            folders[:] = [folder for folder in folders if folder == ADAPTER]  # the rest is its own: checkpoints, say
        if CONFIG_NAME in files:
            found.append(_found(root, path))
        elif is_run and not (path / MODEL).is_dir() and not (path / ADAPTER / CONFIG_NAME).is_file():
            found.append(_found(root, path / ADAPTER))
        if name is not None:
            ahead = way[len(seen) - 1 : len(seen)]
            folders[:] = [folder for folder in folders if folder in ahead]
    return sorted((one for one in found if name in (None, one.name)), key=lambda one: one.name), seen


def files_of(adapter: Path) -> list[Path]:
    """The files of an adapter folder, those of its subfolders too; not hidden ones, nor of adapters within it."""
    found = []
    for path, folders, files in _walk(adapter):
        folders[:] = [name for name in folders if not (path / name / CONFIG_NAME).is_file()]
        found += [path / name for name in files if not name.startswith(".")]
    return sorted(found)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".partial")]
        yield Path(here), folders, files


def _found(root: Path, adapter: Path) -> Found:
    inside = adapter != root and adapter.name == ADAPTER and not (adapter.parent / CONFIG_NAME).is_file()
    owner = adapter.parent if inside else adapter
    is_run = inside and (owner / RECIPE).is_file() and (owner / TASK).is_file()
    return Found(owner.relative_to(root).as_posix(), adapter, owner if is_run else None)

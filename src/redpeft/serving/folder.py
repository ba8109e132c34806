"""The adapters that a server offers: those below a folder, or in a pack, looked up anew at each call.

An adapter's name is its path below the folder, as `redpeft list` shows it; a name from a request never leads out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from redpeft.adapters import Adapter, find_adapter, open_pack, read_adapter
from redpeft.adapters.files import CONFIG_NAME, WEIGHTS_NAME, read_config
from redpeft.adapters.search import find_adapters
from redpeft.errors import UserError

SLACK = 2**24  # bytes beside the numbers: a header, names, a configuration


@dataclass(frozen=True)
class Source:
    """What is served: a folder with adapters and runs in it, or a pack."""

    root: Path

    @property
    def names(self) -> list[str]:
        """The adapters there are now, by name; none, where the folder is empty or gone."""
        if self.root.is_file():
            with open_pack(self.root) as pack:
                return pack.names
        try:
            return [found.name for found in find_adapters(self.root) if (found.adapter / CONFIG_NAME).is_file()]
        except UserError:
            return []

    def find(self, name: str) -> Path | None:
        """Where the adapter of this name lies, which `read` reads; None where there is none, or outside the folder."""
        if leads_out(name):
            return None
        if self.root.is_file():
            return self.root / name if name in self.names else None
        folder = find_adapter(self.root / name)
        return folder if (folder / CONFIG_NAME).is_file() and self.holds(folder) else None

    def holds(self, path: Path) -> bool:
        """Whether a path lies below the folder when all links are followed."""
        return path.resolve().is_relative_to(self.root.resolve())


def leads_out(name: str) -> bool:
    """Whether a name from a request is none, or anything but a plain path below a folder."""
    return not name or "\0" in name or PurePosixPath(name).is_absolute() or bool({"..", "."} & set(name.split("/")))


def is_red(path: Path) -> bool:
    """Whether an adapter that the engine is to load is ours. `UserError`: it has no readable configuration."""
    return _pack_of(path) is not None or read_config(find_adapter(path))["peft_type"] == "REDPEFT"


def read(path: Path, widths: Mapping[str, int] | None = None) -> Adapter:
    """Read an adapter, from a folder or out of a pack (`<pack>/<name>`), with the checks of `read_adapter`.

    `widths`: those of the engine's tables, if known: a file larger than they could take is not read. `UserError`.
    """
    if pack_path := _pack_of(path):
        with open_pack(pack_path) as pack:
            return pack.adapter(path.relative_to(pack_path).as_posix())
    folder = find_adapter(path)
    most = 8 * sum(2 * width + 1 for width in (widths or {}).values()) + SLACK  # of fp64
    for name in (CONFIG_NAME, WEIGHTS_NAME) if widths is not None else ():
        file = folder / name
        if file.is_file() and file.stat().st_size > most:
            raise UserError(f"{file}: {file.stat().st_size:,} bytes, more than edits of this base model can have")
    return read_adapter(folder)


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the adapter is replaced: times, sizes and inodes of its files; of the pack, for one in a pack."""
    files = [pack] if (pack := _pack_of(path)) else [path / CONFIG_NAME, path / WEIGHTS_NAME]
    found = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            found += [0, 0, 0]
        else:
            found += [status.st_mtime_ns, status.st_size, status.st_ino]
    return tuple(found)


def _pack_of(path: Path) -> Path | None:
    return next((parent for parent in path.parents if parent.is_file()), None)

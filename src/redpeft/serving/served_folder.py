"""The adapters that a server offers: those below a folder, searched again at each call.

An adapter's name is its path below the folder, as `redpeft list` shows it. The list and the look-up of one name use
the same rules (`search_adapters`), so an adapter that the list does not show is not served by its name either.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from redpeft.adapters import Adapter, read_adapter
from redpeft.adapters.folder import read_config, read_sites
from redpeft.adapters.listing import Found, search_adapters
from redpeft.errors import UserError
from redpeft.storage import CONFIG_NAME, WEIGHTS_NAME, find_adapter, find_run, is_below

OVERHEAD = 2**24  # bytes that a file may hold besides its numbers: a header, names, a configuration
SETTLED = 2 * 10**9  # ns; two changes of a folder that are further apart have different times on every file system
LARGEST = 1e6  # of scales, and of biases in the output's own size: far above what training gives, far below overflow
REMEMBERED = 4096  # adapters that were refused

FileSignature = tuple[int, ...]


class ServedFolder:
    """A folder with adapters and runs in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: tuple[dict[str, Path], dict[Path, FileSignature]] = {}, {}  # and the folders that were searched

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters that there are now, sorted by name; empty where the folder is empty or gone.

        The same object as long as nothing changes; then the cost is one look at the time of each folder.
        """
        adapters, searched = self._listed
        if not searched or any(_signature(path) != before for path, before in searched.items()):
            self._listed = adapters, _ = self._search()
        return adapters

    def _search(self) -> tuple[dict[str, Path], dict[Path, FileSignature]]:
        """The adapters, and the folders that were searched. No folders where one has changed just now: another change
        could have the same time and would not be seen."""
        began = time.time_ns()
        found, searched = search_adapters(self.root)
        named = {name: one.adapter for one in found if (name := self._name(one)) is not None}
        signatures = {path: _signature(path) for path in searched}
        settled = all(0 < max(signature[:2]) < began - SETTLED for signature in signatures.values())
        return dict(sorted(named.items())), signatures if settled else {}

    def find(self, name: str) -> Path | None:
        """The folder of the adapter of this name; None for every other name."""
        for below in (name, "."):
            for one in search_adapters(self.root, below)[0]:
                if self._name(one) == name:
                    return one.adapter
        return None

    def _name(self, found: Found) -> str | None:
        """The name by which an adapter is served: its path, or the folder's own name where the folder is an adapter or
        a run itself. None where there is nothing to serve yet, or the name is not valid text."""
        name = found.name if found.name != "." else find_run(self.root.resolve()).name
        is_text = name == name.encode(errors="ignore").decode()
        return name if is_text and os.path.isfile(found.adapter / CONFIG_NAME) else None

    def check(self, path: Path) -> None:
        """`UserError` where the adapter, or a file of it, lies outside the folder when all links are followed."""
        if not is_below(path, self.root):
            raise UserError(f"{path}: not served, since it is not below {self.root}")
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            if file.is_symlink() and not is_below(file, self.root):
                raise UserError(f"{file}: not served, since this link leads out of {self.root}: put the file there")


class Refusals:
    """Why adapters were refused, by path and file signature. These adapters are not read again until they change."""

    def __init__(self) -> None:
        self._reasons: OrderedDict[str, tuple[FileSignature, str]] = OrderedDict()

    def add(self, path: str, signature: FileSignature, reason: str) -> None:
        """`signature`: from before the adapter was read."""
        self._reasons.pop(path, None)
        self._reasons[path] = signature, reason
        if len(self._reasons) > REMEMBERED:
            self._reasons.popitem(last=False)

    def reason(self, path: str, signature: FileSignature) -> str | None:
        """Why this adapter was refused; None if it was not, or has changed since."""
        refused, reason = self._reasons.get(path, (None, None))
        return reason if refused == signature else None


def is_red(path: Path) -> bool:
    """Whether an adapter is a RED adapter. `UserError`: it has no readable configuration."""
    folder = find_adapter(path)
    _check_size(folder / CONFIG_NAME, OVERHEAD)
    return read_config(folder)["peft_type"] == "REDPEFT"


def sites_of(path: Path) -> list[str] | None:
    """The sites that an adapter edits; only the names of its tensors are read. None: it is not a RED adapter.
    `UserError`: it is damaged."""
    return read_sites(find_adapter(path)) if is_red(path) else None


def read(path: Path, widths: Mapping[str, int]) -> Adapter:
    """Read an adapter with the checks of `read_adapter`.

    `widths`: of the engine's tables, by site. `UserError`: also for a file larger than edits of these widths can be,
    which is not read.
    """
    folder = find_adapter(path)
    _check_size(folder / CONFIG_NAME, OVERHEAD)
    _check_size(folder / WEIGHTS_NAME, 8 * sum(2 * width + 1 for width in widths.values()) + OVERHEAD)  # of fp64
    return read_adapter(folder)


def check_numbers(adapter: Adapter, dtype: torch.dtype) -> None:
    """`UserError` for scales and biases that would overflow in a model of this dtype: larger than `LARGEST`, or than
    the dtype's largest number (fp16: 65,504)."""
    most = min(LARGEST, torch.finfo(dtype).max)
    for site, edit in adapter.edits.items():
        for what, values in (("scale", edit.scale), ("bias", edit.bias)):
            if (found := values.abs().max().item()) > most:
                raise UserError(
                    f"{adapter.folder}: the {what} of {site} goes up to {found:.3g}, and no more than {most:,.0f} is "
                    f"served in {dtype}: it was trained or composed wrongly"
                )


def file_signature(adapter: Path) -> FileSignature:
    """Times, sizes and inodes of an adapter's files, which change when it is replaced or changed. Zeros where there
    are no files."""
    return *_signature(adapter / CONFIG_NAME), *_signature(adapter / WEIGHTS_NAME)


def _signature(path: Path) -> FileSignature:
    """Of a file or folder: its two times in ns, size and inode; zeros where there is none. One of the times can be set
    back (a copy keeps the time of its source), the other is not kept by every file system."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0, 0, 0
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino


def _check_size(file: Path, most: int) -> None:
    size = _signature(file)[2]
    if size > most:
        raise UserError(f"{file}: {size:,} bytes, more than edits of this base model can have")

"""The adapters that a server offers: those below a folder, or in a pack, looked up anew at each call.

An adapter's name is its path below the folder, as `redpeft list` shows it. The list and the look-up of a name go by
the same rules (`adapters.search`), so that what the list hides is not served by its name either.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from redpeft.adapters import Adapter, open_pack, read_adapter
from redpeft.adapters.files import read_config, read_sites
from redpeft.adapters.search import Found, look_below
from redpeft.errors import UserError
from redpeft.storage import CONFIG_NAME, WEIGHTS_NAME, find_adapter, find_run, is_below

logger = logging.getLogger("vllm.redpeft")

SLACK = 2**24  # bytes beside the numbers: a header, names, a configuration
SETTLED = 2 * 10**9  # ns: changes further apart give a folder another time, on any file system
LARGEST = 1e6  # of scales, and of biases in the output's own size: far beyond what training gives, far below overflow
REMEMBERED = 4096  # adapters that were refused

FileSignature = tuple[int, ...]


class ServedFolder:
    """What is served: a folder with adapters and runs in it, or a pack."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: tuple[dict[str, Path], dict[Path, FileSignature]] = {}, {}  # and what was looked into, as it was

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters that there are now, sorted by name; none, where the folder is empty or gone. As long as nothing
        changes it is the same object, for which each folder is asked for its time and no more."""
        adapters, seen = self._listed
        if not seen or any(_signature(path) != then for path, then in seen.items()):
            self._listed = adapters, _ = self._look()
        return adapters

    def _look(self) -> tuple[dict[str, Path], dict[Path, FileSignature]]:
        """The adapters, and the folders that were looked into; none of these, where one has just changed: the time of
        another change could be the same."""
        began = time.time_ns()
        if self.root.is_file():
            adapters, seen = self._packed(), [self.root]
        else:
            found, seen = look_below(self.root)
            named = {name: one.adapter for one in found if (name := self._offered(one)) is not None}
            adapters = dict(sorted(named.items()))
        stamps = {path: _signature(path) for path in seen}
        settled = all(0 < max(stamp[:2]) < began - SETTLED for stamp in stamps.values())
        return adapters, stamps if settled else {}

    def _packed(self) -> dict[str, Path]:
        try:
            with open_pack(self.root) as pack:
                return {name: self.root / name for name in pack.names}
        except UserError as error:  # it may be on its way
            logger.warning("%s", error)
            return {}

    def find(self, name: str) -> Path | None:
        """Where the adapter of this name lies, which `read` reads; None for whatever is not one of `adapters`."""
        if self.root.is_file():
            return self.adapters.get(name)
        for below in (name, "."):
            for one in look_below(self.root, below)[0]:
                if self._offered(one) == name:
                    return one.adapter
        return None

    def _offered(self, found: Found) -> str | None:
        """The name by which what was found is served: its path, or the folder's own name where the folder is an
        adapter or a run itself. None, where there is nothing to serve yet, or the name's bytes are of no encoding."""
        name = found.name if found.name != "." else find_run(self.root.resolve()).name
        is_text = name == name.encode(errors="ignore").decode()
        return name if is_text and os.path.isfile(found.adapter / CONFIG_NAME) else None

    def check(self, path: Path) -> None:
        """`UserError` for what does not lie below the folder when all links are followed: an adapter, a file of it."""
        if not is_below(path, self.root):
            raise UserError(f"{path}: not served, since it is not below {self.root}")
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            if file.is_symlink() and not is_below(file, self.root):
                raise UserError(f"{file}: not served, since this link leads out of {self.root}: put the file there")


class Refused:
    """Why adapters were refused, by their paths and what their files were then: those are not read again."""

    def __init__(self) -> None:
        self._reasons: OrderedDict[str, tuple[FileSignature, str]] = OrderedDict()

    def add(self, path: str, then: FileSignature, reason: str) -> None:
        """`then`: the stamp from before the adapter was read."""
        self._reasons.pop(path, None)
        self._reasons[path] = then, reason
        if len(self._reasons) > REMEMBERED:
            self._reasons.popitem(last=False)

    def reason(self, path: str, now: FileSignature) -> str | None:
        """Why this adapter was refused; None if it was not, or has changed since."""
        then, reason = self._reasons.get(path, (None, None))
        return reason if then == now else None


def is_red(path: Path) -> bool:
    """Whether an adapter that the engine is to load is ours. `UserError`: it has no readable configuration."""
    if _pack_of(path) is not None:
        return True
    folder = find_adapter(path)
    _check_size(folder / CONFIG_NAME, SLACK)
    return read_config(folder)["peft_type"] == "REDPEFT"


def sites_of(path: Path) -> list[str] | None:
    """The sites that an adapter edits, of which no more is read than the names of its tensors; None: it is no RED
    adapter. `UserError`: it is damaged."""
    return read_sites(find_adapter(path)) if is_red(path) else None


def read(path: Path, widths: Mapping[str, int] | None = None) -> Adapter:
    """Read an adapter, from a folder or out of a pack (`<pack>/<name>`), with the checks of `read_adapter`.

    `widths`: those of the engine's tables, if known: a file larger than they could take is not read. `UserError`.
    """
    if pack_path := _pack_of(path):
        with open_pack(pack_path) as pack:
            return pack.adapter(path.relative_to(pack_path).as_posix())
    folder = find_adapter(path)
    if widths is not None:
        _check_size(folder / CONFIG_NAME, SLACK)
        _check_size(folder / WEIGHTS_NAME, 8 * sum(2 * width + 1 for width in widths.values()) + SLACK)  # of fp64
    return read_adapter(folder)


def check_numbers(adapter: Adapter, dtype: torch.dtype) -> None:
    """`UserError` for scales and biases that would turn the numbers of a model in this dtype into infinities: those
    beyond `LARGEST`, or beyond what the dtype has (fp16: 65,504)."""
    most = min(LARGEST, torch.finfo(dtype).max)
    for site, edit in adapter.edits.items():
        for what, values in (("scale", edit.scale), ("bias", edit.bias)):
            if (found := values.abs().max().item()) > most:
                raise UserError(
                    f"{adapter.folder}: the {what} of {site} goes up to {found:.3g}, and no more than {most:,.0f} is "
                    f"served in {dtype}: it was trained or composed wrongly"
                )


def file_signature(path: Path) -> FileSignature:
    """Changes when the adapter is replaced or changed: times, sizes and inodes of its files, or of the pack that it is
    in. Zeros, where there is nothing."""
    files = [pack] if (pack := _pack_of(path)) else [path / CONFIG_NAME, path / WEIGHTS_NAME]
    return tuple(number for file in files for number in _signature(file))


def _signature(path: Path) -> FileSignature:
    """Of a file or folder: its times in ns, size and inode; zeros where there is none. Of the two times one can be set
    back (copies keep that of their source), and the other is not kept by every file system."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0, 0, 0
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino


def _check_size(file: Path, most: int) -> None:
    size = _signature(file)[2]
    if size > most:
        raise UserError(f"{file}: {size:,} bytes, more than edits of this base model can have")


def _pack_of(path: Path) -> Path | None:
    return next((parent for parent in path.parents if parent.is_file()), None)

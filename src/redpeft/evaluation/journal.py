"""What long work has done so far, on disk as it is done, so that a killed command goes on from there.

The first line holds the settings of the work, every further line one entry. A line is appended in one piece and
brought to the disk before the next begins; of a kill or a full disk at worst a last line is left that is cut short,
and it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.storage import explaining_full_disk, locked


@contextmanager
def journal_of(out: Path, settings: dict[str, Any]) -> Iterator[Journal]:
    """The journal of the work whose result is to be written to `out`: `out`.journal, for this process alone.

    Raises `UserError` where another process is at it, for an `out` that is there and has no journal, and as `Journal`.
    """
    with locked(out.parent, f".{out.name}.lock"):
        journal = Journal(out.with_name(f"{out.name}.journal"), settings)
        if out.exists() and not journal.entries:
            raise UserError(
                f"{out} is there already, and not as work to go on with: choose another --out, or remove it"
            )
        yield journal


class Journal:
    """The entries of earlier calls, and a place for more.

    Attributes:
        entries: what was done, in that order; `append` adds to it.

    Raises `UserError` for a journal of other settings, or a file that is none.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self.entries: list[dict[str, Any]] = []
        self._end = 0  # of the last whole line
        if self.path.is_file():
            self._read()

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Keep `entries`. Raises `UserError` where the file cannot be written, `RunError` for a full disk."""
        entries = list(entries)
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        if not self._end:
            lines.insert(0, json.dumps({"settings": self.settings}, ensure_ascii=False))
        try:
            with explaining_full_disk(self.path.parent):
                self._write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self.entries += entries

    def _write(self, data: bytes) -> None:
        with self.path.open("r+b" if self._end else "wb") as file:
            file.seek(self._end)
            file.truncate()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()

    def _read(self) -> None:
        data = self.path.read_bytes()
        self._end = data.rfind(b"\n") + 1
        if not self._end:
            return
        try:
            first, *rest = [json.loads(line) for line in data[: self._end].splitlines()]
            before = first["settings"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path} is damaged or no journal of unfinished work: remove it") from None
        differing = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if differing:
            raise UserError(
                f"{self.path} is of work with other settings ({', '.join(differing)}): choose another --out, or "
                "remove it"
            )
        self.entries = rest

"""Write a pack: what lies below a folder becomes the tables, the contents and the index that `pack` describes."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from redpeft.adapters.compose import check_same_base
from redpeft.adapters.files import Adapter, read_adapter
from redpeft.adapters.pack import FILES, METADATA, Content, Entry, Group, Index, digest, open_pack
from redpeft.adapters.search import Found, files_of, find_adapters
from redpeft.errors import RunError, UserError
from redpeft.storage import RECIPE, RESULT, TASK, WEIGHTS_NAME, default_mode, temporary_path

LARGEST_INDEX = 60_000_000  # bytes: safetensors reads no header of more than 100 MB, in which its quotes are escaped
PICKLES = (".bin", ".pt", ".pth", ".pkl")  # optimizers, say: large, and nothing to take from a stranger


@dataclass(frozen=True)
class Packed:
    """What was packed: `groups` of like shapes, `bytes` of the file; not `unfinished` runs without an adapter, nor
    files that may be pickles (`left_out`, by their paths)."""

    out: Path
    adapters: int
    groups: int
    bytes: int
    unfinished: list[str]
    left_out: list[str]


def pack_adapters(folder: str | Path, out: str | Path) -> Packed:
    """Write all adapters below `folder` into one file, `out`, with the small files of their runs.

    They are of one base model, as `compose.check_same_base` tells. The file is read back and compared by sha256 before
    it gets its name. `UserError`, with nothing written: an `out` that is there, no adapters, adapters of different
    bases, whatever `read_adapter` refuses. `RunError`: an adapter that was changed meanwhile.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another, or remove it")
    found = find_adapters(folder)
    unfinished = [one.name for one in found if one.unfinished and not one.adapter.is_dir()]
    collected = _Collected(folder)
    try:
        for one in found:
            if one.name not in unfinished:
                collected.add(one)
    except OSError as error:  # a broken link, no right to read
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if not collected.entries:
        raise UserError(f"{folder}: no adapters there but unfinished runs")
    _write(out, collected)
    sizes = len(collected.entries), len(collected.groups), out.stat().st_size
    return Packed(out, *sizes, unfinished, collected.left_out)


@dataclass
class _Collected:
    """What was found: all but the tables, which are filled when their sizes are known."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)  # of the contents
    left_out: list[str] = field(default_factory=list)
    _rows: Counter[int] = field(default_factory=Counter)  # of each group so far
    _group_of: dict[bytes, int] = field(default_factory=dict)  # by the header of an adapter's file
    _content_of: dict[str, int] = field(default_factory=dict)  # by sha256
    _bases: dict[frozenset[str], Adapter] = field(default_factory=dict)  # the first adapter of each set of sites

    def add(self, found: Found) -> None:
        self._check_base(read_adapter(found.adapter))
        weights = (found.adapter / WEIGHTS_NAME).read_bytes()
        group = self._group(weights)
        entry = Entry(
            name=found.name,
            folder=self._below(found.adapter),
            group=group,
            row=self._rows[group],
            sha256=digest(weights),
            files={self._below(path): self._content(path.read_bytes()) for path in self._files(found)},
        )
        self._rows[group] += 1
        self.entries.append(entry)

    def index(self) -> str:
        text = Index(groups=self.groups, contents=self.contents, adapters=self.entries).model_dump_json()
        if len(text) > LARGEST_INDEX:
            raise UserError(f"{self.root}: {len(self.entries)} adapters are too many for one pack: pack them in parts")
        return text

    def tables(self) -> dict[str, torch.Tensor]:
        """The tables by name. One adapter at a time is in memory temporary_path them."""
        tables: dict[str, torch.Tensor] = {}
        for entry in self.entries:
            path = self.root / entry.folder / WEIGHTS_NAME
            data = path.read_bytes() if path.is_file() else b""
            if digest(data) != entry.sha256:
                raise RunError(f"{path} was changed while it was being packed: run the same command again")
            for key, tensor in load(data).items():
                name = f"{entry.group}/{key}"
                if name not in tables:
                    tables[name] = torch.empty((self._rows[entry.group], *tensor.shape), dtype=tensor.dtype)
                tables[name][entry.row] = tensor
        return tables

    def _check_base(self, adapter: Adapter) -> None:
        """Against the first adapter of all, and of the same sites: fingerprints of other sites tell nothing."""
        alike = self._bases.setdefault(frozenset(adapter.edits), adapter)
        for other in (next(iter(self._bases.values())), alike):
            if other is not adapter:
                check_same_base([other, adapter])

    def _group(self, weights: bytes) -> int:
        """The number of the group that has the header of this file: 8 bytes with its length, and JSON."""
        header = weights[: 8 + int.from_bytes(weights[:8], "little")]
        if header not in self._group_of:
            self._group_of[header] = len(self.groups)
            tensors = {key: tensor for key, tensor in json.loads(header[8:]).items() if key != "__metadata__"}
            in_order = sorted(tensors, key=lambda key: tensors[key]["data_offsets"])
            self.groups.append(Group(header=self._content(header), tensors=in_order))
        return self._group_of[header]

    def _content(self, data: bytes) -> int:
        """The number of a content, which is added if it is new."""
        key, start = digest(data), len(self.data)
        if key not in self._content_of:
            self.data += data
            self._content_of[key] = len(self.contents)
            self.contents.append(Content(sha256=key, start=start, end=len(self.data)))
        return self._content_of[key]

    def _files(self, found: Found) -> list[Path]:
        there = [path for path in files_of(found.adapter) if path != found.adapter / WEIGHTS_NAME]
        self.left_out += [self._below(path) for path in there if path.suffix in PICKLES]
        of_run = [found.run / name for name in (RECIPE, TASK, RESULT)] if found.run else []
        return [path for path in there if path.suffix not in PICKLES] + [path for path in of_run if path.is_file()]

    def _below(self, path: Path) -> str:
        """The path as the index has it, which is JSON."""
        below = path.relative_to(self.root).as_posix()
        try:
            below.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.root}: the name {below!r} there is not UTF-8: rename it") from error
        return below


def _write(out: Path, collected: _Collected) -> None:
    """Under a temporary name, which becomes `out` when all of it was read back."""
    index = collected.index()
    tensors = collected.tables() | {FILES: torch.frombuffer(collected.data, dtype=torch.uint8)}
    temporary = temporary_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={METADATA: index})
        temporary.chmod(default_mode(out.parent))
        with open_pack(temporary) as pack:
            for name in pack.names:
                deque(pack.files(name), maxlen=0)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    except UserError as error:
        raise RunError(f"{out}: what was written does not read back ({error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()

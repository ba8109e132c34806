"""A pack: many adapters of one base model in one safetensors file, as tables with an index, bit for bit.

    <group>/<key of adapter_model.safetensors>    (adapters of the group, *the tensor's shape), of its dtype
    files                                         uint8: all other files, each distinct content once, one after another

The adapters of a group have the same keys, shapes and dtypes: the headers of their files are the same bytes, and are
kept among the contents. An adapter's file is that header and then its row of each table, whatever library wrote it.
The index is JSON in the metadata, with the sha256 of each adapter's file and of each content. `packing` writes packs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from redpeft.adapters.files import Adapter, as_adapter, parse_config, split_key
from redpeft.errors import UserError, some
from redpeft.storage import CONFIG_NAME, WEIGHTS_NAME, escapes_root, new_folder

METADATA, FILES = "redpeft_pack", "files"
Number = Annotated[int, Field(ge=0)]


class Content(BaseModel):
    """A file's content, and where it lies in `files`."""

    sha256: str
    start: Number
    end: Number


class Group(BaseModel):
    """Adapters whose files have one header: the number of its content, and the tensors in the order of their data."""

    header: Number
    tensors: list[str]


class Entry(BaseModel):
    """One adapter. Paths are those below the folder that was packed; `files` has the numbers of their contents."""

    name: str
    folder: str
    group: Number
    row: Number
    sha256: str  # of adapter_model.safetensors
    files: dict[str, Number]


class Index(BaseModel):
    """What the metadata holds."""

    version: Literal[1] = 1
    groups: list[Group]
    contents: list[Content]
    adapters: list[Entry]


class Pack:
    """An open pack. Of the tables no more is read than the rows asked for; what is read is checked by its sha256."""

    def __init__(self, path: Path, index: Index, file: Any) -> None:
        self.path = path
        self._index, self._file = index, file
        self._entries = {entry.name: entry for entry in index.adapters}
        self._checked: set[int] = set()

    @property
    def names(self) -> list[str]:
        """The adapters: their paths below the folder that was packed, without a trailing /adapter."""
        return list(self._entries)

    @property
    def sites(self) -> list[str]:
        """All modules that any of the adapters edits, by the tensors' names alone."""
        keys = (key for group in self._index.groups for key in group.tensors)
        return list(dict.fromkeys(named[0] for key in keys if (named := split_key(key)) is not None))

    def adapter(self, name: str) -> Adapter:
        """An adapter with the checks of `read_adapter`. `UserError` as there, for no such name and a damaged pack."""
        path = within(self._entry(name).folder, CONFIG_NAME)
        config = parse_config(self.file(name, path) or b"", self.path / path)
        return as_adapter(self.path / name, config, lambda: self._tensors(name))

    def weights(self, name: str) -> bytes:
        """An adapter's `adapter_model.safetensors`. `UserError`: no such name, a damaged pack."""
        entry = self._entry(name)
        with self._naming_damage(name):
            group = self._index.groups[entry.group]
            rows = [self._slice(f"{entry.group}/{key}", entry.row, entry.row + 1) for key in group.tensors]
            return self._check(b"".join([self._content(group.header, name), *rows]), entry.sha256, name)

    def file(self, name: str, path: str) -> bytes | None:
        """Another file of an adapter or its run, by its path below the folder that was packed; None if not there."""
        number = self._entry(name).files.get(path)
        return None if number is None else self._content(number, path)

    def files(self, name: str) -> Iterator[tuple[str, bytes]]:
        """Every file of an adapter and its run, the tensors' first, by its path below the folder that was packed."""
        entry = self._entry(name)
        yield within(entry.folder, WEIGHTS_NAME), self.weights(name)
        for path, number in entry.files.items():
            yield path, self._content(number, path)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"{self.path}: this pack has no adapter {name}; it has {some(self.names)}")
        return self._entries[name]

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        with self._naming_damage(name):
            return load(self.weights(name))

    def _content(self, number: int, name: str) -> bytes:
        with self._naming_damage(name):
            content = self._index.contents[number]
            data = self._slice(FILES, content.start, content.end)
        if number not in self._checked:  # what many adapters share, such as a tokenizer, is hashed once
            self._check(data, content.sha256, name)
            self._checked.add(number)
        return data

    def _slice(self, table: str, start: int, end: int) -> bytes:
        rows = self._file.get_slice(table)[start:end]
        return rows.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def _check(self, data: bytes, sha256: str, name: str) -> bytes:
        if digest(data) != sha256:
            raise self._damaged(name)
        return data

    @contextmanager
    def _naming_damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, IndexError) as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self.path}: damaged, {name} is not there as it was packed; copy the file again")


@contextmanager
def open_pack(path: str | Path) -> Iterator[Pack]:
    """Open a pack that `pack_adapters` wrote, to read some of it.

    `UserError`: no such file, another kind of file, a file cut short, or an index that leads out of a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: corrupt or truncated, not a safetensors file ({error}); copy it again") from error
    with opened as file:
        yield Pack(path, _index(path, file), file)


def unpack_adapters(path: str | Path, out: str | Path, only: Sequence[str] = ()) -> list[str]:
    """Write the adapters of a pack into the folder `out`, as they lay in the folder that was packed; return their
    names. `only`: some of these names.

    `UserError`, with nothing written: as `open_pack`, names that are not there, damage, an `out` that is not empty.
    """
    with open_pack(path) as pack, new_folder(Path(out)) as folder:
        names = list(dict.fromkeys(only)) or pack.names
        for name in names:
            for below, data in pack.files(name):
                (folder / below).parent.mkdir(parents=True, exist_ok=True)
                (folder / below).write_bytes(data)
    return names


def within(folder: str, name: str) -> str:
    """The path of a file in a folder of the pack, as the index has it."""
    return str(PurePosixPath(folder) / name)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _index(path: Path, file: Any) -> Index:
    text = (file.metadata() or {}).get(METADATA)
    if text is None:
        raise UserError(f"{path}: this is no pack of adapters, which redpeft pack writes")
    try:
        index = Index.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: its index is damaged, or of a later version of redpeft") from error
    for entry in index.adapters:
        for below in (entry.name, entry.folder, *entry.files):
            if escapes_root(below):
                raise UserError(f"{path}: {below!r} in its index would lie outside the folder: do not use this file")
    return index

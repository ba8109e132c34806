"""What lies in a folder or a pack: a row for each adapter, with what it is, how it scored and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from redpeft.adapters.files import Adapter, read_adapter, read_config
from redpeft.adapters.pack import Pack, open_pack, within
from redpeft.adapters.search import Found, find_adapters
from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.models import fingerprint_difference
from redpeft.storage import RECIPE, RESULT, WEIGHTS_NAME

Facts = dict[str, Any]  # some fields of a row


@dataclass(frozen=True)
class ListedAdapter:
    """One adapter. What nobody recorded, or what could not be read, is None.

    `validation` and `test` are of `metric`, the run's own; `parameters` are those of the edits, `bytes` those of
    adapter_model.safetensors. `fingerprint` is a short form, the same where the fingerprints agree. An adapter of
    another method than RED is not checked.
    """

    name: str
    status: Literal["ok", "unfinished", "damaged", "not checked"]
    reason: str | None = None  # where it is damaged
    base: str | None = None
    task: str | None = None
    method: str | None = None
    sites: str | None = None
    metric: str | None = None
    validation: float | None = None
    test: float | None = None
    parameters: int | None = None
    head_parameters: int | None = None
    bytes: int | None = None
    fingerprint: str | None = None


def list_adapters(path: str | Path) -> list[ListedAdapter]:
    """A row for each adapter and unfinished run below a folder, or for each adapter of a pack; sorted by name.

    Each is read and checked: as `read_adapter` does, and in a pack every file by its sha256. A damaged one is a row
    like the others. `UserError`: no such folder or file, nothing there, a file that is no pack or was cut short.
    """
    path, prints = Path(path), _Prints()
    if path.is_file():
        with open_pack(path) as pack:
            return [_in_pack(pack, name, prints) for name in pack.names]
    return [_in_folder(found, prints) for found in find_adapters(path)]


def adapters_table(rows: Sequence[ListedAdapter], title: str) -> Table:
    """The rows as a table; why one is damaged is left to lines of its own."""
    caption = "score: validation / test; parameters: edits + head; weights: the same where the fingerprints agree"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", overflow="fold", min_width=16)
    table.add_column("base", overflow="fold", min_width=12)
    for name in ("task", "method", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "size"):
        table.add_column(name, no_wrap=True, justify="right")
    for name in ("weights", "status"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        texts = (
            row.name,
            Path(row.base or "-").name,
            row.task or "-",
            _joined(" ", row.method, row.sites),
            _scores(row),
        )
        size = "-" if row.bytes is None else f"{row.bytes / 1024:,.0f} KiB"
        table.add_row(*texts, _parameters(row), size, row.fingerprint or "-", row.status)
    return table


def _joined(between: str, *parts: str | None) -> str:
    return between.join(part for part in parts if part) or "-"


def _scores(row: ListedAdapter) -> str:
    scores = ["-" if score is None else f"{score:.4g}" for score in (row.validation, row.test)]
    return "-" if row.metric is None else f"{row.metric} {' / '.join(scores)}"


def _parameters(row: ListedAdapter) -> str:
    if row.parameters is None:
        return "-"
    return f"{row.parameters:,}" + (f" + {row.head_parameters:,}" if row.head_parameters else "")


class _Prints:
    """Short forms of fingerprints. As these may differ by rounding, the first of those that agree gives the form."""

    def __init__(self) -> None:
        self._known: list[tuple[dict[str, Any], str]] = []

    def short(self, fingerprint: dict[str, Any] | None) -> str | None:
        if not fingerprint:
            return None
        for known, short in self._known:
            if fingerprint_difference(known, fingerprint) is None:
                return short
        short = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
        self._known.append((fingerprint, short))
        return short


def _in_folder(found: Found, prints: _Prints) -> ListedAdapter:
    def run_file(name: str) -> bytes | None:
        path = found.run and found.run / name
        return path.read_bytes() if path and path.is_file() else None

    def facts() -> Facts:
        if found.unfinished and not found.adapter.is_dir():
            return {}
        method = read_config(found.adapter)["peft_type"]
        if method != "REDPEFT":
            return {"method": str(method).lower(), "status": "not checked"}
        size = (found.adapter / WEIGHTS_NAME).stat().st_size
        return _of_adapter(read_adapter(found.adapter), prints) | {"bytes": size}

    return _row(found.name, found.run or found.adapter, run_file, facts)


def _in_pack(pack: Pack, name: str, prints: _Prints) -> ListedAdapter:
    def facts() -> Facts:
        sizes = [len(data) for _, data in pack.files(name)]  # reads and checks them all, the tensors' first
        return _of_adapter(pack.adapter(name), prints) | {"bytes": sizes[0]}

    return _row(name, pack.path / name, lambda file: pack.file(name, within(name, file)), facts)


def _row(name: str, where: Path, run_file: Callable[[str], bytes | None], facts: Callable[[], Facts]) -> ListedAdapter:
    """What its run says goes before what the adapter says: the task is the run's, the method its name for it."""
    known: Facts = {"status": "ok"}
    try:
        run = _of_run(where, run_file)
        known |= run
        known |= facts() | run
    except (UserError, OSError) as error:
        known |= {"status": "damaged", "reason": str(error)}
    return ListedAdapter(name=name, **known)


def _of_adapter(adapter: Adapter, prints: _Prints) -> Facts:
    config, asked = adapter.config, adapter.config.get("sites")
    return {
        "base": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
        "method": "red",
        "sites": ",".join(asked) if isinstance(asked, list) else asked or counted(len(adapter.edits), "module"),
        "parameters": sum(edit.scale.numel() + edit.bias.numel() for edit in adapter.edits.values()),
        "head_parameters": sum(tensor.numel() for tensor in adapter.head.values()),
        "fingerprint": prints.short(config.get("base_fingerprint")),
    }


def _of_run(where: Path, run_file: Callable[[str], bytes | None]) -> Facts:
    """From result.json or, before there is one, from recipe.yaml; nothing for an adapter outside a run."""
    if (content := run_file(RESULT)) is not None:
        result = _parsed(json.loads, content, where / RESULT)
        scores = {split: _score(result, split) for split in ("validation", "test")}
        return {key: result.get(key) for key in ("base", "task", "method", "metric")} | scores
    if (content := run_file(RECIPE)) is not None:
        recipe = _parsed(yaml.safe_load, content, where / RECIPE)
        base = recipe.get("base")
        named = base.get("model") if isinstance(base, dict) else base
        return {"status": "unfinished", "base": named, "task": recipe.get("task"), "method": recipe.get("method")}
    return {}


def _parsed(parse: Callable[[bytes], Any], content: bytes, path: Path) -> dict[str, Any]:
    try:
        found = parse(content)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged (it holds no fields)")
    return found


def _score(result: dict[str, Any], split: str) -> float | None:
    scores = result.get(split)
    value = scores.get(result.get("metric")) if isinstance(scores, dict) else None
    return value if isinstance(value, int | float) else None

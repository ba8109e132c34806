"""The adapters below a folder: where they are, what each is, how it scored and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from redpeft.adapters.folder import read_adapter, read_config
from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.models import fingerprint_difference
from redpeft.storage import ADAPTER, CONFIG_NAME, MODEL, RECIPE, RESULT, TASK, WEIGHTS_NAME

Facts = dict[str, Any]  # some fields of a ListedAdapter


# --- where adapters are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An adapter folder, and the run folder around it, if any. A run that is unfinished or damaged may have none
    yet."""

    name: str  # its path below the folder that was searched, without a trailing /adapter
    adapter: Path
    run: Path | None

    @property
    def unfinished(self) -> bool:
        return self.run is not None and not (self.run / RESULT).is_file()


def search_adapters(root: Path, name: str | None = None) -> tuple[list[Found], list[Path]]:
    """The adapters below `root`, sorted by name, and the folders that were searched.

    These are all adapter folders and all runs that should have one; `root` itself may be one. Skipped are runs of
    methods that save a whole model, links to folders, hidden folders and folders that are being written (`.partial`).
    With a `name`, only the adapter of that name is looked for, by the same rules, in the folders that lead to it.
    """
    found, searched = [], []
    parts = PurePath(name or "", ADAPTER).parts
    for here, folders, files in os.walk(root):
        path = Path(here)
        searched.append(path)
        folders[:] = [folder for folder in folders if not folder.startswith(".") and not folder.endswith(".partial")]
        is_run = RECIPE in files and TASK in files
        if is_run:
            folders[:] = [folder for folder in folders if folder == ADAPTER]  # the others hold its checkpoints, ...
        if CONFIG_NAME in files:
            found.append(_found(root, path))
        elif is_run and not (path / MODEL).is_dir() and not (path / ADAPTER / CONFIG_NAME).is_file():
            found.append(_found(root, path / ADAPTER))
        if name is not None:
            next_part = parts[len(searched) - 1 : len(searched)]
            folders[:] = [folder for folder in folders if folder in next_part]
    return sorted((one for one in found if name in (None, one.name)), key=lambda one: one.name), searched


def _found(root: Path, adapter: Path) -> Found:
    inside = adapter != root and adapter.name == ADAPTER and not (adapter.parent / CONFIG_NAME).is_file()
    owner = adapter.parent if inside else adapter
    is_run = inside and (owner / RECIPE).is_file() and (owner / TASK).is_file()
    return Found(owner.relative_to(root).as_posix(), adapter, owner if is_run else None)


# --- what they are ---------------------------------------------------------------------------------------------------


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


def list_adapters(folder: str | Path) -> list[ListedAdapter]:
    """Every adapter and unfinished run below a folder, sorted by name.

    Each adapter is read and checked as `read_adapter` does; a damaged one is listed with the reason. `UserError`: no
    such folder, or no adapters there.
    """
    root, prints = Path(folder), _Fingerprints()
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    found, _ = search_adapters(root)
    if not found:
        raise UserError(f"{root}: no adapters there")
    return [_listed(one, prints) for one in found]


def _listed(found: Found, prints: _Fingerprints) -> ListedAdapter:
    """What the run records overrides what the adapter records: the task and the method have the run's names."""
    known: Facts = {"status": "ok"}
    try:
        run = _run_facts(found.run) if found.run else {}
        known |= run
        known |= _adapter_facts(found, prints) | run
    except (UserError, OSError) as error:
        known |= {"status": "damaged", "reason": str(error)}
    return ListedAdapter(name=found.name, **known)


def _adapter_facts(found: Found, prints: _Fingerprints) -> Facts:
    if found.unfinished and not found.adapter.is_dir():
        return {}
    config = read_config(found.adapter)
    recorded = {"base": config.get("base_model_name_or_path"), "task": config.get("task_type")}
    if config["peft_type"] != "REDPEFT":
        return recorded | {"method": str(config["peft_type"]).lower(), "status": "not checked"}
    adapter, asked = read_adapter(found.adapter), config.get("sites")
    return recorded | {
        "method": "red",
        "sites": ",".join(asked) if isinstance(asked, list) else asked or counted(len(adapter.edits), "module"),
        "parameters": sum(edit.scale.numel() + edit.bias.numel() for edit in adapter.edits.values()),
        "head_parameters": sum(tensor.numel() for tensor in adapter.head.values()),
        "bytes": (found.adapter / WEIGHTS_NAME).stat().st_size,
        "fingerprint": prints.short(config.get("base_fingerprint")),
    }


def _run_facts(run: Path) -> Facts:
    """From result.json or, before there is one, from recipe.yaml."""
    if (path := run / RESULT).is_file():
        result = _fields(path, json.loads)
        scores = {split: _score(result, split) for split in ("validation", "test")}
        return {key: result.get(key) for key in ("base", "task", "method", "metric")} | scores
    recipe = _fields(run / RECIPE, yaml.safe_load)
    base = recipe.get("base")
    named = base.get("model") if isinstance(base, dict) else base
    return {"status": "unfinished", "base": named, "task": recipe.get("task"), "method": recipe.get("method")}


def _fields(path: Path, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        found = parse(path.read_bytes())
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged (it holds no fields)")
    return found


def _score(result: Facts, split: str) -> float | None:
    scores = result.get(split)
    value = scores.get(result.get("metric")) if isinstance(scores, dict) else None
    return value if isinstance(value, int | float) else None


class _Fingerprints:
    """Short forms of fingerprints. Those that differ only by rounding get the form of the first of them."""

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


# --- as a table ------------------------------------------------------------------------------------------------------


def adapters_table(rows: Sequence[ListedAdapter], title: str) -> Table:
    """The adapters as a table, without the reasons why some are damaged."""
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
        scores = " / ".join("-" if score is None else f"{score:.4g}" for score in (row.validation, row.test))
        parameters = "-" if row.parameters is None else f"{row.parameters:,}"
        table.add_row(
            row.name,
            Path(row.base or "-").name,
            row.task or "-",
            " ".join(part for part in (row.method, row.sites) if part) or "-",
            "-" if row.metric is None else f"{row.metric} {scores}",
            parameters + (f" + {row.head_parameters:,}" if row.head_parameters else ""),
            "-" if row.bytes is None else f"{row.bytes / 1024:,.0f} KiB",
            row.fingerprint or "-",
            row.status,
        )
    return table

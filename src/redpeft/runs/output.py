"""Output folders of many runs: a file in them says whose they are, so that no command writes into another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.storage import write_atomically


def check_folder(record: Path, identity: Mapping[str, Any], what: str) -> None:
    """Raises `UserError` where the folder of `record` holds something else than a `what`, or one of another identity.

    `record` is the file that says so: a JSON object, with the fields of `identity` among others.
    """
    folder = record.parent
    if record.is_file():
        there, here = read_record(record), json.loads(json.dumps(identity))
        if other := [key for key in here if here[key] != there.get(key)]:
            raise UserError(
                f"{folder} holds runs with another {', '.join(other)}: choose another --out, or keep it the same"
            )
    elif folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no {what}: choose another --out")


def read_record(record: Path) -> dict[str, Any]:
    """What the file of a folder that passed `check_folder` holds; nothing where there is none."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of something else
        return {}
    return found if isinstance(found, dict) else {}


def claim(record: Path, identity: Mapping[str, Any]) -> None:
    """Write into an output folder whose it is, beside what its record holds."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps({**read_record(record), **identity}, indent=2))

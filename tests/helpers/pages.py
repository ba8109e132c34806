"""The code blocks of README and docs, and how they are run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from redpeft import cli

BLOCK = re.compile(r"^( *)```(\w+)( run)?\n(.*?)^ *```$", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[tuple[str, bool, str]]:
    """The code blocks of a page in these languages: (language, whether it is run, its text)."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    flat = [(kind, bool(run), re.sub(f"^{indent}", "", text, flags=re.M)) for indent, kind, run, text in found]
    return [block for block in flat if block[0] in languages]


def run_commands(text: str, monkeypatch) -> None:
    """Run the calls of redpeft in a block, each of which has to succeed."""
    for line in text.replace("\\\n", " ").splitlines():
        said, _, call = line.rpartition(" | ")
        if call.startswith("redpeft "):
            typed = io.BytesIO((said and shlex.split(said)[-1] + "\n").encode())
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed))
            call, _, file = call.partition(" > ")
            with (
                pytest.raises(SystemExit) as exit_,
                Path(file or os.devnull).open("w", encoding="utf-8") as out,
                contextlib.redirect_stdout(out),
            ):
                cli.main(shlex.split(os.path.expandvars(call), comments=True)[1:])
            assert exit_.value.code == 0, line

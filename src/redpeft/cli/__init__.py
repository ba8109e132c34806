"""`redpeft ...`: one function per command, no logic of its own."""

from __future__ import annotations

import sys
from typing import NoReturn

from redpeft.cli import adapters, runs  # noqa: F401  (importing them registers their commands)
from redpeft.cli.command import app


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, `sys.argv` by default, and exit."""
    sys.exit(app(arguments, prog_name="redpeft"))

"""`redpeft ...`: one function per command, no logic of its own."""

from __future__ import annotations

import sys
from typing import NoReturn

from redpeft.cli.command import app as app
from redpeft.cli.command import run_app

# importing these registers their commands; --help lists them in this order
from redpeft.cli import runs  # noqa: F401  # isort: skip
from redpeft.cli import fleets  # noqa: F401  # isort: skip
from redpeft.cli import adapters  # noqa: F401  # isort: skip
from redpeft.cli import language_models  # noqa: F401  # isort: skip
from redpeft.cli import reproduce  # noqa: F401  # isort: skip


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, `sys.argv` by default, and exit."""
    sys.exit(run_app(sys.argv[1:] if arguments is None else arguments))

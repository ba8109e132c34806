"""The ways in which redpeft fails on purpose, and the words that their messages share; anything else is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """The caller's input is wrong. The message says in one line what is wrong and what to do; commands exit with 2."""


class RunError(RuntimeError):
    """The work itself failed (a loss that is not finite, a full disk). Commands exit with 1; a run can be resumed."""


class Stopped(RunError):
    """The run was told to stop (Ctrl-C, SIGTERM) and has kept what it did. No run after it starts; exit code 130."""


def shorten_list(names: Sequence[str], at_most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest of those that are known, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""What the commands share: every one returns its answer, and the decorator `command` does the rest.

`--json`, standard output kept for the answer alone, and the exit codes 0, 1 (the work failed) and 2 (the call was
wrong) with one line on standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect as python_inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from redpeft.errors import RunError, UserError

app = typer.Typer(name="redpeft", add_completion=False, pretty_exceptions_enable=False)
UsageError: Any = typer.BadParameter.__base__  # click's; newer typers carry a copy of click of their own

WIDTH = 140  # of tables that do not go to a terminal

Json = Annotated[bool, typer.Option("--json", help="Print JSON; all else goes to standard error.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, or the adapter folder in it.", show_default=False)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command prints: `data` with --json, otherwise the tables and lines of `shown`; then `error`, if any."""

    data: dict[str, Any]
    shown: list[Any]
    error: RunError | None = None


def command(example: str) -> Callable[[Callable], Callable]:
    """Register a function that returns an `Answer`, or an iterator of rows that become JSON lines.

    One that takes `tell` gets with --json a function to call with what happens, a JSON line each before the answer,
    and otherwise None.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            out = sys.stdout
            if tells:
                arguments["tell"] = (lambda event: print(_dump(event), file=out, flush=True)) if as_json else None
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    answer = function(**arguments)
                    if os.environ.get("RANK", "0") == "0":  # of several processes one answers
                        _print(answer, as_json, out)
            except UserError as error:
                _fail(error, 2)
            except RunError as error:
                _fail(error, 1)

        signature = python_inspect.signature(function, eval_str=True)
        parameters = [each for each in signature.parameters.values() if each.name != "tell"]
        tells = "tell" in signature.parameters
        json_option = python_inspect.Parameter(
            "as_json", python_inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json
        )
        run.__name__ = function.__name__.rstrip("_")  # `list_` is the command list
        run.__signature__ = signature.replace(parameters=[*parameters, json_option])  # type: ignore
        return app.command(epilog=f"Example: {example}")(run)

    return register


def recipe_and_fields(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe file, if one is among them, and the KEY=VALUE. UserError for two files."""
    recipes = [argument for argument in arguments if "=" not in argument]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {', '.join(recipes)}; fields are given as key=value")
    return (recipes[0] if recipes else None), [argument for argument in arguments if "=" in argument]


def run_app(arguments: list[str]) -> int:
    """Run the command line and return its exit code. A call that no command understands is one line too."""
    try:
        return app(arguments or ["--help"], prog_name="redpeft", standalone_mode=False) or 0
    except UsageError as error:
        message, path = error.format_message(), error.ctx.command_path if error.ctx else "redpeft"
        _tell(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {path} --help")
        return 2
    except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130
        return 1


def _print(answer: Answer | Iterator[dict[str, Any]], as_json: bool, out: TextIO) -> None:
    if isinstance(answer, Iterator):
        for row in answer:
            print(_dump(row), file=out, flush=True)
    elif as_json:
        print(_dump(answer.data), file=out)
    else:
        console = Console(file=out, width=None if out.isatty() else WIDTH)
        for part in answer.shown:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    if isinstance(answer, Answer) and answer.error:
        raise answer.error


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dataclasses.asdict(value)


def _fail(error: Exception, code: int) -> NoReturn:
    _tell(str(error))
    raise typer.Exit(code)


def _tell(message: str) -> None:
    print(f"redpeft: {' '.join(message.split())}", file=sys.stderr)


@app.callback()
def redpeft() -> None:
    """Fine-tune a frozen transformer with two vectors per layer (RED, Representation EDiting)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT still calls there
    logging.basicConfig(format="%(message)s")
    logging.getLogger("redpeft").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every 8-bit layer in every forward pass

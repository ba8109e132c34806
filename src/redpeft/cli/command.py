"""What the commands share: every one returns its answer, and the decorator `command` does the rest.

`--json`, standard output kept for the answer alone, and the exit codes 0, 1 (the work failed), 2 (the call was wrong)
and 130 (interrupted; the same command again goes on) with one line on standard error. What needs no model (help, a
wrong call) is answered without importing torch, so this room imports the others within its functions only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect as python_inspect
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from redpeft import __version__
from redpeft.errors import RunError, Stopped, UserError

app = typer.Typer(name="redpeft", pretty_exceptions_enable=False)
UsageError: Any = typer.BadParameter.__base__  # click's; newer typers carry a copy of click of their own

WIDTH = 140  # of tables that do not go to a terminal
FIELDS = "KEY=VALUE"  # in the metavar of arguments that are fields of a recipe
INTERRUPTED = 130

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
            except Stopped as error:
                _fail(error, INTERRUPTED)
            except RunError as error:
                _fail(error, 1)
            except KeyboardInterrupt:
                _fail("interrupted; the same command again goes on from what was saved", INTERRUPTED)

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


def recipe_and_fields(name: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe file, if one is among the arguments of the command `name`, and the KEY=VALUE.

    Raises `UserError` for two files, and for data or a model in place of a recipe.
    """
    recipes = [argument for argument in arguments if "=" not in argument or Path(argument).is_file()]
    for path in recipes:
        if key := _field_of(Path(path)):
            others = [argument for argument in arguments if argument not in recipes]
            fields = {"base": "base=MODEL", "data": "data=FILE", **{each.partition("=")[0]: each for each in others}}
            right = " ".join({**fields, key: f"{key}={shlex.quote(path)}"}.values())
            raise UserError(f"{path} is no recipe: give it as a field, as in: redpeft {name} {right}")
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {', '.join(recipes)}; fields are given as key=value")
    return (recipes[0] if recipes else None), [argument for argument in arguments if argument not in recipes]


def _field_of(path: Path) -> str | None:
    """The field that somebody means who gives this path, and who does not mean a recipe."""
    if path.is_dir():
        return "base" if (path / "config.json").is_file() else "data"
    return None if path.suffix.lower() in ("", ".yaml", ".yml", ".json") or not path.is_file() else "data"


def run_app(arguments: list[str]) -> int:
    """Run the command line and return its exit code. A call that no command understands is one line too."""
    try:
        return app(arguments or ["--help"], prog_name="redpeft", standalone_mode=False) or 0
    except UsageError as error:
        message, path = error.format_message(), error.ctx.command_path if error.ctx else "redpeft"
        stop = "" if message.endswith((".", "?")) else "."
        _tell(f"{message}{stop} See {path} --help{_as_fields(error, arguments)}")
        return 2
    except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130
        return INTERRUPTED


def _as_fields(error: Any, arguments: Sequence[str]) -> str:
    """What to write instead of unknown options where a command takes the fields of a recipe: lr=1e-2 for --lr 1e-2."""
    parameters = error.ctx.command.params if error.ctx and hasattr(error, "option_name") else []
    if not any(FIELDS in (parameter.metavar or "") for parameter in parameters):
        return ""
    known = {option for parameter in parameters for option in parameter.opts}
    right: list[str] = []
    left = list(arguments)
    while left:
        name, equals, value = (argument := left.pop(0)).partition("=")
        if name.startswith("--") and name not in known and (equals or (left and not left[0].startswith("--"))):
            argument = f"{name[2:].replace('-', '_')}={value if equals else left.pop(0)}"
        right.append(argument)
    if right == list(arguments):
        return f"; fields of a recipe are written without dashes, as {FIELDS}"
    return f"; fields of a recipe are written without dashes: redpeft {shlex.join(right)}"


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


def _fail(error: object, code: int) -> NoReturn:
    _tell(str(error))
    raise typer.Exit(code)


def _tell(message: str) -> None:
    print(f"redpeft: {' '.join(message.split())}", file=sys.stderr)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"redpeft {__version__}")
        raise typer.Exit


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is standard error at the time: a process may run several commands, each with another one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@app.callback()
def redpeft(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a frozen transformer with two vectors per layer (RED, Representation EDiting)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT still calls there
    logging.basicConfig(format="%(message)s", handlers=[_Lines()])
    logging.getLogger("redpeft").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every 8-bit layer in every forward pass

"""What the commands share: each returns a `CommandOutput`, and the decorator `command` does the rest.

That is `--json`, standard output for the result alone, and the exit codes 0, 1 (the work failed), 2 (the call was
wrong) and 130 (interrupted; the same command continues), each with one line on standard error. Help and errors in a
call need no model and must not wait for torch: this package imports the others inside its functions only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect as python_inspect
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from redpeft import __version__
from redpeft.console import is_first_process
from redpeft.errors import RunError, Stopped, UserError

app = typer.Typer(name="redpeft", pretty_exceptions_enable=False)
UsageError: Any = typer.BadParameter.__base__  # click's; newer typers carry a copy of click of their own

WIDTH = 140  # of tables that do not go to a terminal
FIELDS = "KEY=VALUE"  # in the metavar of arguments that are fields of a recipe
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON. Everything else goes to standard error.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, or the adapter folder in it.", show_default=False)]


@dataclasses.dataclass(frozen=True)
class CommandOutput:
    """What a command prints: `data` with --json, otherwise the tables and lines in `shown`; then `error`, if any."""

    data: dict[str, Any]
    shown: list[Any]
    error: RunError | None = None


def command(example: str) -> Callable[[Callable], Callable]:
    """Register a function that returns a `CommandOutput`, or an iterator of rows that become JSON lines.

    A function with a parameter `on_event` gets with --json a callback that prints each event as a JSON line before the
    result, and otherwise None. One with a parameter `stdout` gets standard output, while what is printed goes to
    standard error.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            out = sys.stdout
            if "on_event" in given:
                arguments["on_event"] = (lambda event: print(_dump(event), file=out, flush=True)) if as_json else None
            if "stdout" in given:
                arguments["stdout"] = out
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    output = function(**arguments)
                    if is_first_process():  # of several, one prints
                        _print(output, as_json, out)
            except UserError as error:
                _fail(error, 2)
            except Stopped as error:
                _fail(error, INTERRUPTED)
            except RunError as error:
                _fail(error, 1)
            except KeyboardInterrupt:
                _fail("interrupted; run the same command again to continue from what was saved", INTERRUPTED)

        signature = python_inspect.signature(function, eval_str=True)
        given = {"on_event", "stdout"}.intersection(signature.parameters)
        parameters = [each for each in signature.parameters.values() if each.name not in given]
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
            raise UserError(f"{path} is not a recipe: give it as a field, such as: redpeft {name} {right}")
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {', '.join(recipes)}; fields are written as key=value")
    return (recipes[0] if recipes else None), [argument for argument in arguments if argument not in recipes]


def _field_of(path: Path) -> str | None:
    """The field that was probably meant by a path that is not a recipe; None for a recipe."""
    if path.is_dir():
        return "base" if (path / "config.json").is_file() or any(path.glob("*.gguf")) else "data"
    if path.suffix == ".gguf":
        return "base"
    return None if path.suffix.lower() in ("", ".yaml", ".yml", ".json") or not path.is_file() else "data"


def run_app(arguments: list[str]) -> int:
    """Run the command line and return its exit code. Errors in a call are one line too."""
    try:
        return app(arguments or ["--help"], prog_name="redpeft", standalone_mode=False) or 0
    except UsageError as error:
        message, path = error.format_message(), error.ctx.command_path if error.ctx else "redpeft"
        stop = "" if message.endswith((".", "?")) else "."
        _log_error(f"{message}{stop} See {path} --help{_as_fields(error, arguments)}")
        return 2
    except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130
        return INTERRUPTED


def _as_fields(error: Any, arguments: Sequence[str]) -> str:
    """What to write instead of an unknown option, for commands that take recipe fields: lr=1e-2 for --lr 1e-2."""
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
        return f"; recipe fields are written without dashes, as {FIELDS}"
    return f"; recipe fields are written without dashes: redpeft {shlex.join(right)}"


def _print(output: CommandOutput | Iterator[dict[str, Any]], as_json: bool, out: TextIO) -> None:
    if isinstance(output, Iterator):
        for row in output:
            print(_dump(row), file=out, flush=True)
    elif as_json:
        print(_dump(output.data), file=out)
    else:
        console = Console(file=out, width=None if out.isatty() else WIDTH)
        for part in output.shown:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    if isinstance(output, CommandOutput) and output.error:
        raise output.error


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dataclasses.asdict(value)


def _fail(error: object, code: int) -> NoReturn:
    _log_error(str(error))
    raise typer.Exit(code)


def _log_error(message: str) -> None:
    print(f"redpeft: {' '.join(message.split())}", file=sys.stderr)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"redpeft {__version__}")
        raise typer.Exit


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current standard error: one process may run several commands, each with another one."""

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
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT still uses there
    # PEFT's, with every adapter that is saved on a base from a GGUF file
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    logging.basicConfig(format="%(message)s", handlers=[_StderrHandler()])
    logging.getLogger("redpeft").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every 8-bit layer in every forward pass

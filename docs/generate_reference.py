"""Write the parts of the reference pages that the code knows best: fields, commands, signatures, tensors.

    python docs/generate_reference.py

A page is written by hand, but for what stands between `<!-- generated: NAME -->` and `<!-- end -->`. The tests fail
while a page is not what this script would write.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.models import ArgumentInfo, CommandInfo

import redpeft
from redpeft.cli import app
from redpeft.training.recipe import SHORT, Recipe

PAGES = Path(__file__).parent / "reference"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def recipe_fields() -> str:
    """Every field of a recipe by its dotted key."""
    return _table(("field", "type", "default", "meaning"), _recipe_rows(Recipe))


def short_names() -> str:
    """The short names by what they stand for."""
    names: dict[str, list[str]] = {}
    for name, key in SHORT.items():
        names.setdefault(key, []).append(f"`{name}`")
    return _table(("short name", "field"), ((", ".join(short), f"`{key}`") for key, short in names.items()))


def _recipe_rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"`{prefix}{name}`", "text or fields", "required", field.description
            yield from _recipe_rows(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
        yield f"`{prefix}{name}`", _type(field.annotation), default, field.description


def config_fields() -> str:
    """RedConfig's own fields, without those that PEFT gives to every method."""
    inherited = {field.name for field in fields(peft.PeftConfig)}
    hints = typing.get_type_hints(redpeft.RedConfig)
    arguments = inspect.cleandoc(redpeft.RedConfig.__doc__).split("Args:\n")[1].split("\n\n")[0]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M))
    rows = [
        (f"`{field.name}`", _type(hints[field.name]), f"`{field.default!r}`", " ".join(meanings[field.name].split()))
        for field in fields(redpeft.RedConfig)
        if field.name not in inherited and field.default is not MISSING
    ]
    return _table(("field", "type", "default", "meaning"), rows)


def signatures() -> str:
    """The public functions and classes with the first sentence that each says of itself."""
    from redpeft import adapters
    from redpeft.adapters import arithmetic, card, listing, released, stats
    from redpeft.evaluation import chat, generate, language_model, lm_harness
    from redpeft.reproduce import plan, run_tables
    from redpeft.runs import job_list, on_ray, runner, sweep
    from redpeft.tasks import data, e2e, files, metrics
    from redpeft.training import learner, predict, preview, recipe, train

    shown = {
        "redpeft": [getattr(redpeft, name) for name in redpeft.__all__],
        "redpeft.RedModel": [redpeft.RedModel.add_weighted_adapter, redpeft.RedModel.set_scale],
        "redpeft.adapters": [getattr(adapters, name) for name in ("read_adapter", "load_adapter", "write_adapter")]
        + [adapters.Adapter, adapters.EffectiveEdit],
        "redpeft.adapters.listing": [listing.list_adapters, listing.ListedAdapter],
        "redpeft.adapters.stats": [stats.summarize, stats.compare, stats.plot, stats.preview],
        "redpeft.adapters.card": [card.write_card],
        "redpeft.adapters.arithmetic": [
            *(arithmetic.compose, arithmetic.weighted_sum, arithmetic.sequence, arithmetic.inverse),
            *(arithmetic.keep_scale, arithmetic.keep_bias, arithmetic.keep_layers, arithmetic.trim),
            *(arithmetic.take_head, arithmetic.check_same_base),
        ],
        "redpeft.adapters.released": [released.import_released, released.export_released],
        "redpeft.training.recipe": [recipe.load_recipe, recipe.template],
        "redpeft.training.train": [train.train],
        "redpeft.training.preview": [preview.preview, preview.RunPreview],
        "redpeft.training.learner": [learner.trainable_parameters, learner.Trained],
        "redpeft.training.predict": [predict.load_run, predict.open_run, predict.evaluate, predict.predict],
        "redpeft.runs.runner": [runner.run_recipe, runner.jobs_of, runner.run_jobs],
        "redpeft.runs.sweep": [sweep.run_sweep],
        "redpeft.runs.job_list": [job_list.run_fleet],
        "redpeft.runs.on_ray": [on_ray.run_on_ray],
        "redpeft.reproduce.run_tables": [run_tables.reproduce, run_tables.show_plan],
        "redpeft.reproduce.plan": [plan.Request],
        "redpeft.tasks.data": [data.read_data],
        "redpeft.tasks.files": [files.read_file],
        "redpeft.tasks.metrics": [metrics.score_texts, metrics.nist],
        "redpeft.tasks.e2e": [e2e.score_files],
        "redpeft.evaluation.chat": [chat.chat],
        "redpeft.evaluation.generate": [generate.generate],
        "redpeft.evaluation.language_model": [language_model.open_language_model, language_model.Decoding],
        "redpeft.evaluation.lm_harness": [lm_harness.evaluate_adapters, lm_harness.parse_tasks],
        "redpeft.errors": [redpeft.errors.UserError, redpeft.errors.RunError],
    }
    sections = [f"### `{module}`\n\n" + "\n".join(map(_signature, names)) for module, names in shown.items()]
    return "\n\n".join(sections)


def _signature(thing: Any) -> str:
    says = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    arguments = "" if isinstance(thing, type) else re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(thing)))
    arguments = re.sub(r"<function (\w+) at \w+>", r"\1", arguments)
    return f"- `{thing.__name__}{arguments}`: {says}"


def commands() -> str:
    """Every command: what it does, its arguments and options, an example."""
    return "\n\n".join(map(_command, app.registered_commands))


def _command(command: CommandInfo) -> str:
    rows, usage = [], []
    for parameter in inspect.signature(command.callback).parameters.values():
        kind, says = typing.get_args(parameter.annotation)
        required = parameter.default is inspect.Parameter.empty
        if isinstance(says, ArgumentInfo):
            shown = (says.metavar or parameter.name.upper()) + ("..." if typing.get_origin(kind) is list else "")
            usage.append(shown if required else f"[{shown}]")
        else:
            names = [name for name in (says.default, *(says.param_decls or ())) if isinstance(name, str)]
            shown = (names or [f"--{parameter.name}"])[0] + ("" if kind is bool else f" {_value(kind)}")
        given = parameter.default not in (inspect.Parameter.empty, None, False)
        rows.append((f"`{shown}`", "required" if required else f"`{parameter.default}`" if given else "", says.help))
    name, example = command.callback.__name__.replace("_", "-"), command.epilog.removeprefix("Example: ")
    return (
        f"## `redpeft {name}`\n\n{inspect.getdoc(command.callback)}\n\n"
        f"```text\nredpeft {' '.join([name, '[OPTIONS]', *usage])}\n```\n\n"
        + _table(("argument or option", "default", "meaning"), rows)
        + f"\n\nExample:\n\n```bash\n{example}\n```"
    )


def _value(kind: typing.Any) -> str:
    """What an option takes: the names to choose among, or any text."""
    literal = next((k for k in (kind, *typing.get_args(kind)) if typing.get_origin(k) is typing.Literal), None)
    return "|".join(typing.get_args(literal)) if literal else "TEXT"


def tensors() -> str:
    """What the file of an adapter of a small Llama holds (two blocks, width 64)."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), redpeft.RedConfig(task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_file(Path(folder) / "adapter_model.safetensors")
    rows = [(f"`{key}`", str(value.dtype)[6:], f"`{tuple(value.shape)}`") for key, value in sorted(found.items())]
    return _table(("key", "dtype", "shape"), rows)


def _table(head: tuple[str, ...], rows: typing.Iterable[tuple[str | None, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell or "") for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    escaped = " ".join(text.split()).replace("|", r"\|")
    return escaped if escaped.startswith("`") else escaped.replace("<", r"\<")


def _type(annotation: Any) -> str:
    """`str | None` is text: a field that may be left out says so by its default."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(_type(part) for part in typing.get_args(annotation) if part is not types.NoneType)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if annotation is dict or typing.get_origin(annotation) is dict:
        return "fields"
    if typing.get_origin(annotation) in (list, Collection, Sequence):
        return f"list of {_type(typing.get_args(annotation)[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]


def _plain(value: Any) -> str:
    """A default as it stands in YAML."""
    if isinstance(value, Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


BLOCKS: dict[str, Callable[[], str]] = {
    "recipe": recipe_fields,
    "short": short_names,
    "config": config_fields,
    "signatures": signatures,
    "commands": commands,
    "tensors": tensors,
}


def pages() -> dict[Path, str]:
    """Each page with generated parts, as it should be."""
    found = {}
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text):
            found[path] = BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]]()}\n\n{match[3]}", text)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

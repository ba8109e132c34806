"""The recipe: everything that decides the outcome of a training run, in one YAML file."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from redpeft.errors import UserError
from redpeft.storage import CHECKPOINTS, LOCK, RECIPE, RESULT, TASK, read_result, write_atomically
from redpeft.tasks.base import TASKS, DataConfig
from redpeft.training.baselines import DEFAULT_RATES, METHODS, Method

HEADER = """\
# A redpeft recipe. Run it with `redpeft train THIS_FILE`. `key=value` after the file name overrides a field; nested
# fields have dots (`data.text=body`) or a short name (`text=body`, `lr=1e-2`). A field that a recipe leaves out has
# the value shown here.
"""


if TYPE_CHECKING:
    TaskName = str
    Length = int
else:
    TaskName = Literal[tuple(TASKS)] | None
    Length = int | None

UNRESOLVED: Any = None
"""Of a field that is not given, and that a resolved recipe has."""

FIELDS_OF_TASKS = (
    *("packing", "learn_prompt", "problem_type", "loss", "reward", "beta", "num_generations", "temperature"),
    *("max_completion_length", "trainer_options"),
)
"""Fields that some tasks have (`Task.recipe_fields`), and others do not."""

EXAMPLES = {"base.model": "FacebookAI/roberta-base", "data.path": "path/to/data"}  # what the template shows


class Base(BaseModel):
    """The frozen model that is adapted."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        description="Folder or GGUF file of the base model, its name on the Hugging Face Hub, or a short name."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a base model on the Hub.")
    load_in: Literal["8bit", "4bit", "int8_weight_only"] | None = Field(
        None,
        description="Load the base model quantised: 8bit or 4bit by bitsandbytes, int8_weight_only by torchao.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of the base model's weights (with load_in: of those that are not quantised). auto: "
        "fp32 if precision is fp32 or the base's own weights are trained, otherwise the checkpoint's.",
    )


class Recipe(BaseModel):
    """One training job, or one for each of several seeds. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    base: Base = Field(description="The base model: a folder or a name on the Hugging Face Hub, or these fields.")
    task: TaskName = Field(
        UNRESOLVED,
        description="What is learned: classification (also multi-label and regression), token-classification, "
        "instruction (prompt and response, or chat messages; the loss is on the responses), preference (a prompt with "
        "a better and a worse answer), reward (prompts, to which the model's own answers are scored), e2e (data to "
        "text: a meaning representation and its text), or text-to-text (classification with an encoder-decoder such "
        "as T5, which generates the label). Default: guessed from the columns of the data, and shown.",
    )
    metric: str | None = Field(
        None, description="The metric that chooses the best epoch. Default: the task's main metric."
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = Field(
        None,
        description="Classification: single_label_classification, multi_label_classification or regression. "
        "Default: inferred from the labels.",
    )
    data: DataConfig = Field(description="The rows to learn from: a path, or these fields.")
    loss: str | None = Field(
        None,
        description="Preference: dpo or ipo (pairs of a better and a worse answer), or kto (also single answers "
        "with a label). Default: dpo. Reward: grpo.",
    )
    reward: list[str] | None = Field(
        None,
        description="Reward: what scores an answer, one or several that are added up. exact_match: whether it is the "
        "row's response. reasoning-gym: the score of a data set of that package. Or module:function, a function as "
        "TRL calls it, in a module that is installed or in the working folder.",
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="Preference and reward: how strongly the model is held to its start. Default: TRL's, 0.1 for "
        "preference and 0 for reward.",
    )
    num_generations: int | None = Field(
        None, ge=2, description="Reward: how many answers to a prompt are compared with each other. Default: TRL's, 8."
    )
    temperature: float | None = Field(
        None, gt=0, description="Reward: the temperature at which answers are sampled. Default: TRL's, 1."
    )
    max_completion_length: int | None = Field(
        None, ge=1, description="Reward: the longest answer in tokens. Default: TRL's, 512."
    )
    trainer_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Preference and reward: other fields of TRL's DPOConfig, KTOConfig or GRPOConfig, such as "
        "desirable_weight.",
    )
    method: str = Field(
        "red",
        description=f"What is trained beside the head: red, a baseline ({', '.join(list(METHODS)[1:])}), or any other "
        "method of PEFT by its name, such as vera, with its own method_options.",
    )
    method_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the method: the fields of RedConfig (sites, unit, ...) or of PEFT's configuration "
        "(lora: r, lora_alpha, target_modules, ...; prompt and prefix: num_virtual_tokens, ...), or bottleneck, "
        "drop_layers, ... (adapter), add_biases (bitfit), layers (top_layers).",
    )
    init_from: str | None = Field(
        None, description="A RED adapter, or a run with one, to continue from; it brings its own method options."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate. Default: "
        + ", ".join(f"{method} {rate:g}" for method, rate in DEFAULT_RATES.items())
        + "; PEFT's other methods have none. Preference and reward: a tenth of that.",
    )
    head_lr: float | None = Field(None, gt=0, description="Peak learning rate of the head. Default: learning_rate.")
    head: Literal["all", "last"] = Field(
        "all",
        description="Which part of a classifier's head is trained: all of it, or only its last layer. With last, the "
        "layers before it come from the base's checkpoint if it has them (RoBERTa's dense layer is most of its head; "
        "folding a trained adapter puts one into the checkpoint).",
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="Rows in one optimiser step, in all processes together. Reward: these are prompts, each of which "
        "gets num_generations answers.",
    )
    epochs: float = Field(5, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps. Overrides epochs.")
    warmup: float = Field(
        0.06,
        ge=0,
        description="Share of the steps in which the learning rate rises from 0; from 1 on, the number of steps.",
    )
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: no clipping.")
    max_length: Length = Field(
        UNRESOLVED,
        ge=1,
        description="Longest row in tokens. Default: 2048 for instruction, preference and reward, 256 for others. "
        "Longer rows are cut, also where the model or its tokenizer takes less. Rows with nothing left to learn are "
        "left out, and for reward prompts that leave no room for max_completion_length. Both are counted and "
        "reported.",
    )
    packing: bool = Field(False, description="Instruction: pack several short rows into one of max_length.")
    learn_prompt: bool = Field(
        False,
        description="Instruction: also learn the prompts, as the RED paper's released script does. Otherwise the loss "
        "is on the responses only.",
    )
    group_by_length: bool = Field(
        True, description="Put rows of similar length into a batch, so that little is padding."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Compute each process's share of a batch in this many pieces, to save memory."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of the computation; edits and heads are always held in fp32. auto: bf16 on a GPU "
        "that has it or if base.dtype is bf16, otherwise fp32. A CPU without bf16 instructions takes many times as "
        "long, with a warning.",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after this many evaluations in a row (one an epoch) without an improvement."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Also write a checkpoint after every this many steps (there is one after each epoch)."
    )
    seed: int = Field(0, ge=0, description="Seed of the head's initial weights, the order of the rows, and dropout.")
    seeds: list[int] | None = Field(
        None, min_length=1, description="Several seeds: one run for each, in folders seed-<n>, and a summary."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Also report to tensorboard, wandb or trackio."
    )
    output: str | None = Field(None, description="The run folder. Default: runs/<data>-<method>.")

    @field_validator("base", mode="before")
    @classmethod
    def _base_by_name(cls, value: Any) -> Any:
        return _as_fields("base", value)

    @field_validator("data", mode="before")
    @classmethod
    def _data_by_path(cls, value: Any) -> Any:
        return _as_fields("data", value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed_seeds(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value

    @field_validator("reward", mode="before")
    @classmethod
    def _listed_rewards(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_reporter(cls, value: Any) -> Any:
        if value is None or value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        try:
            METHODS[name]
        except UserError as error:
            raise PydanticCustomError("unknown_method", "{why}", {"why": str(error)}) from None
        return name

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.learning_rate is None and self.chosen_method.rate is None:
            raise ValueError(f"method {self.method} has no default learning rate: give learning_rate")
        if self.init_from is not None and self.method != "red":
            raise ValueError(f"init_from continues a RED adapter, so method must be red, not {self.method}")
        if self.init_from is not None and self.method_options:
            raise ValueError("init_from brings its own method_options; leave them out")
        if self.task is not None:
            self._check_task()
        method = self.chosen_method
        if self.packing and not method.packed:
            raise ValueError(
                f"packing would put several rows after one prompt: leave it out with method {self.method}"
            )
        if self.gradient_checkpointing and not method.checkpointed:
            raise ValueError(
                f"method {self.method} does not work with gradient_checkpointing, which discards the {self.method}"
            )
        if self.base.load_in and not method.quantised:
            able = ", ".join(name for name, each in METHODS.items() if each.quantised)
            raise ValueError(f"base.load_in quantises the base: for {able}, not for {self.method}")
        if self.batch_size % self.gradient_accumulation and not self.reward:  # of rewards answers are divided
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by gradient_accumulation {self.gradient_accumulation}"
            )
        return self

    def _check_task(self) -> None:
        """Raises `ValueError` for fields that the task does not have."""
        task = TASKS[self.task]
        for name in FIELDS_OF_TASKS:
            if getattr(self, name) and name not in task.recipe_fields:
                able = " and ".join(task for task in TASKS if name in TASKS[task].recipe_fields)
                raise ValueError(f"{name} is for the task {able}, not {self.task}")
        if self.loss is not None and self.loss not in task.losses:
            raise ValueError(f"no loss is called {self.loss!r}: choose {', '.join(task.losses)}")
        if "reward" in task.recipe_fields and not self.reward:
            raise ValueError(f"the task {self.task} needs reward: exact_match, reasoning-gym or module:function")
        usual = task.recipe_defaults.get("beta")
        if usual and self.beta == 0:
            raise ValueError(f"beta: the task {self.task} needs a beta above 0; the default is {usual:g}")
        if (usual if self.beta is None else self.beta) and not self.chosen_method.is_peft:
            raise ValueError(
                f"the task {self.task} compares the model with its start, which method {self.method} does not keep: "
                "choose red, lora or another method of PEFT"
            )
        if self.head == "last" and not task.task_type.endswith("_CLS"):
            raise ValueError(f"head says what is trained of a classifier's head, but the task {self.task} has none")

    @property
    def chosen_method(self) -> Method:
        return METHODS[self.method]

    @property
    def all_options(self) -> dict[str, Any]:
        """The method_options, with the method's own defaults for those that are not given."""
        return self.chosen_method.defaults | self.method_options

    def resolved(self) -> Recipe:
        """This recipe with the learning rate and the options that the method chooses, the task of its data, and the
        length that the task chooses. `UserError`: fields that do not fit the task, or data for an unknown task."""
        name = self.task or self._guess_task()
        task, rate = TASKS[name], self.chosen_method.rate
        chosen = {
            "task": name,
            **{field: value for field, value in task.recipe_defaults.items() if getattr(self, field) is None},
            "learning_rate": self.learning_rate or (rate and rate / task.rate_divisor),
            "max_length": self.max_length or task.max_length,
            "method_options": self.all_options,
        }
        resolved = self.model_copy(update=chosen)
        try:
            resolved._check_task()
        except ValueError as error:
            raise UserError(str(error)) from None
        return resolved

    def _guess_task(self) -> str:
        from redpeft.tasks.data import guess_task  # only here: it imports datasets

        if self.packing or self.learn_prompt:
            return "instruction"
        if self.reward:
            return "reward"
        if self.loss:
            return "preference"
        return "classification" if self.problem_type else guess_task(self.data)

    def alone(self) -> Recipe:
        """The resolved recipe of a single run, without `seeds` and `output`."""
        return self.resolved().model_copy(update={"seeds": None, "output": None})

    def without_vllm(self) -> Recipe:
        """This recipe for a Trainer that gets its answers otherwise than by TRL's own vLLM."""
        options = {name: value for name, value in self.trainer_options.items() if name != "use_vllm"}
        return self.model_copy(update={"trainer_options": options})

    def run_folder(self) -> Path:
        """Where the run is written: `output`, or runs/<data>-<method>."""
        name = Path(self.data.path or self.data.train or "").stem or ("mix" if self.data.mix else "data")
        name = name.replace(":", "-")  # of reasoning-gym:NAME
        return Path(self.output) if self.output else Path("runs") / f"{name}-{self.method}"

    def differences(self, other: Recipe) -> list[str]:
        """The dotted keys in which two resolved recipes differ, except `output`."""
        mine, theirs = (flatten(recipe.resolved().model_dump(mode="json")) for recipe in (self, other))
        return [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key) and key != "output"]

    def result_in(self, folder: Path) -> dict[str, Any] | None:
        """The result of this recipe's run in `folder`; None where there is work to do.

        Raises `UserError` for a folder with a run of another recipe, or with something else.
        """
        if (folder / RECIPE).is_file():
            if other := self.differences(load_recipe(folder / RECIPE)):
                raise UserError(
                    f"{folder} holds a run of another recipe ({', '.join(other[:5])} differ): choose another output "
                    "folder"
                )
            return read_result(folder) if (folder / RESULT).is_file() else None
        if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {CHECKPOINTS, LOCK}):
            raise UserError(f"{folder} is not empty and holds no run: choose another output folder")
        if (folder.parent / TASK).is_file():
            raise UserError(f"{folder} would lie inside the run folder {folder.parent}: choose another output folder")
        return None

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML, by a temporary file and a rename."""
        text = yaml.safe_dump(self.resolved().model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(Path(path), text.rstrip("\n"))


OPTIONS = (
    *("sites", "unit", "layers_to_transform", "target_modules", "exclude_modules", "use_scale", "use_bias"),
    *("r", "lora_alpha", "lora_dropout", "num_virtual_tokens", "bottleneck", "add_biases"),
)
SHORT = {
    "lr": "learning_rate",
    "batch": "batch_size",
    "num_train_epochs": "epochs",
    "out": "output",
    "output_dir": "output",
    "model": "base.model",
    "revision": "base.revision",
    "load_in": "base.load_in",
    **{name: f"data.{name}" for name in DataConfig.model_fields if name != "path"},
    **{name: f"method_options.{name}" for name in OPTIONS},
    "rank": "method_options.r",
    "alpha": "method_options.lora_alpha",
}
"""Names that may stand for a field wherever one is given: in a file, on the command line, in a list of jobs."""
IN_SHORT = {"base": "model", "data": "path"}
"""Fields with others inside, which may be given as a plain text: what it is."""


def full_name(key: str) -> str:
    """The full key of a field. `key` may be a short name."""
    return SHORT.get(key, key)


def with_full_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file with their full names. Raises `UserError` for a field that is given twice."""
    full = {key: value for key, value in values.items() if key not in SHORT}
    for key in IN_SHORT.keys() & full.keys():
        full[key] = _as_fields(key, full[key])
    for key, value in values.items():
        if key in SHORT:
            if SHORT[key] in flatten(full):
                raise UserError(f"{key} and {SHORT[key]} are the same field: leave one of them out")
            _set(full, SHORT[key], value)
    return full


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Recipe:
    """Read the recipe in `path`, if given, and change it by `overrides`.

    `overrides` are texts `key=value`, with values as in YAML, or a dict. A key may have dots (`data.path`) or be a
    short name (`SHORT`). Raises `UserError` with one line for a file that cannot be read, an unknown key (with the
    nearest one) or a wrong value.
    """
    values = {} if path is None else with_full_names(read_yaml(path))
    if not isinstance(overrides, Mapping):
        overrides = dict(map(parse_override, overrides or ()))
    for key, value in overrides.items():
        _set(values, full_name(key), value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors()[:3])) from None


def dotted_fields(recipe: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe file, if there is one, changed by texts `key=value`. They have full dotted keys, and
    `load_recipe` takes them as overrides. Raises `UserError` as `load_recipe` does."""
    values = flatten(with_full_names(read_yaml(recipe))) if recipe else {}
    return {**values, **dict(map(parse_override, overrides))}


def template() -> str:
    """A recipe with every field, its meaning and its default, as `redpeft init` writes it."""
    return HEADER + "".join(_template_lines(Recipe))


class _Yaml(yaml.SafeLoader):
    """In YAML 1.1 the value 1e-3 is a text. Here it is a number, as in YAML 1.2 and other tools."""


_Yaml.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields in a YAML file. Raises `UserError` for a file that cannot be read or has no fields."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _Yaml) or {}
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} holds no fields; `redpeft init` writes one to start from")
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """The full key and the value of a text `key=value`. Raises `UserError` for any other text."""
    key, equals, value = text.partition("=")
    key = full_name(key.strip())
    if not equals or not key:
        raise UserError(f"{text!r} is not of the form key=value")
    if value.strip() and not re.search(r"""[\w\[\]{}'"~]""", value):  # a separator, most of which mean much in YAML
        return key, value.strip()
    try:
        return key, yaml.load(value, _Yaml)
    except yaml.YAMLError:
        return key, value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """values["a"]["b"] = value for the key "a.b". `base` and `data` may hold a plain text before."""
    *parents, last = key.split(".")
    for parent in parents:
        inside = _as_fields(parent, values.get(parent))
        if not isinstance(inside, dict):
            raise UserError(f"{key}: {parent} holds no fields")
        values[parent] = inside
        values = inside
    values[last] = value


def _as_fields(key: str, value: Any) -> Any:
    """The fields that a value stands for: none for None, one for a plain text if `key` may be given as one."""
    if value is None:
        return {}
    return {IN_SHORT[key]: value} if key in IN_SHORT and isinstance(value, str) else value


def _explain(problem: Mapping[str, Any]) -> str:
    """An error of pydantic as one line for people."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = _nearest(where)
        return f"unknown key {where!r}" + (f": did you mean {near!r}?" if near else "; `redpeft init` lists them all")
    if problem["type"] == "missing":
        return f"{where} is missing: {_describe(problem['loc'])}"
    if problem["type"] == "unknown_method":
        return problem["msg"]
    message = problem["msg"].removeprefix("Value error, ")
    several = isinstance(problem["input"], dict)  # of whose fields the message names the wrong one
    return f"{where}: {message}" + ("" if several else f", not {problem['input']!r}") if where else message


def _nearest(key: str) -> str | None:
    """The full name of the field that is most like a key. Its last part is compared, and short names too."""
    last = key.rpartition(".")[2]

    def search(full: Sequence[str], cutoff: float) -> str | None:
        names = {name.rpartition(".")[2]: name for name in reversed(full)} | {name: name for name in full} | SHORT
        near = [last] if last in names else difflib.get_close_matches(key, names, n=1, cutoff=cutoff)
        return names[near[0]] if near else None

    fields = _field_names(Recipe)
    if found := search(fields, 0.8):  # without the import of PEFT, which has the options of its methods
        return found
    options = dict.fromkeys(name for method in METHODS.values() for name in method.option_names)
    return search([*fields, *(f"method_options.{name}" for name in options)], 0.5)


def _field_names(model: Any, prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if _is_model(field.annotation):
            names += _field_names(field.annotation, f"{prefix}{name}.")
    return names


def _describe(loc: Sequence[Any]) -> str:
    model: Any = Recipe
    for part in loc[:-1]:
        model = model.model_fields[part].annotation
    return model.model_fields[loc[-1]].description or ""


def _template_lines(model: Any, parent: str = "") -> list[str]:
    lines = []
    indent = "  " if parent else ""
    for name, field in model.model_fields.items():
        lines += [] if parent else ["\n"]
        lines += [f"{indent}# {line}\n" for line in textwrap.wrap(field.description or "", 117 - len(indent))]
        if _is_model(field.annotation):
            lines += [f"{name}:\n", *_template_lines(field.annotation, f"{name}.")]
        else:
            value = EXAMPLES.get(parent + name, field.get_default(call_default_factory=True))
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            lines.append(f"{indent}{name}: {text}\n")
    return lines


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

"""What a task is: what is learned from rows, and how it is scored.

A new task is a subclass of `Task` in a module of its own, and an entry in `TASKS`. Training, fleets and evaluation ask
a task for what differs and have no case for any. This module imports neither torch nor datasets, so that a recipe can
be read quickly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from redpeft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOWER_IS_BETTER = {"mse", "loss"}
"""Of the metrics by which a task chooses its best epoch; of all others a higher value is better."""


SOURCE_FIELDS = ("path", "config_name", "generate", "train", "validation", "test", "header")
COLUMN_FIELDS = (
    *("text", "text_pair", "label", "tokens", "tags", "prompt", "response", "messages", "system", "tools"),
    *("chosen", "rejected"),
)
"""Fields of the data that each part of a mix has for itself."""


class DataConfig(BaseModel):
    """Where the data is and what its columns mean. Columns that are not named are guessed and shown."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        None,
        description="A data set's name on the Hugging Face Hub, reasoning-gym:NAME for questions of that package, a "
        "folder (train, validation and test files, a folder of texts for each class, or what save_to_disk wrote), or "
        "one file of training rows (.csv, .tsv, .jsonl, .json, .parquet, .xlsx).",
    )
    config_name: str | None = Field(
        None,
        description="The Hub data set's configuration, such as 'sst2' of 'nyu-mll/glue'; for a folder, one inside it.",
    )
    generate: dict[str, Any] | None = Field(
        None,
        description="Data of reasoning-gym (path: reasoning-gym:NAME): how many rows train, validation and test have "
        "(default: 1000, 200 and 200), and the data set's own options, such as max_terms.",
    )
    train: str | None = Field(None, description="File of training rows; overrides those of `path`.")
    validation: str | None = Field(None, description="File of validation rows; overrides those of `path`.")
    test: str | None = Field(None, description="File of test rows; overrides those of `path`.")
    header: Literal["first", "none"] | None = Field(
        None,
        description="Tables (.csv, .tsv, .xlsx): first: the first row holds the column names. none: there are no "
        "names, and the columns are called column_1, column_2, ... Default: the first row holds the names, and one "
        "that looks like data is an error.",
    )
    mix: list[dict[str, Any]] | None = Field(
        None,
        description="Several data sets instead of one, each with the fields that say where it is (path, train, ...), "
        "the names of its columns (text, prompt, ...), and a weight: its share of the training rows (default: 1). "
        "They are drawn by the seed, until one of the data sets has no more.",
    )
    protocol: Literal["glue", "glue-t5"] | None = Field(
        None,
        description="Make GLUE's test split as the RED paper does, from the public validation set by the seed, since "
        "GLUE's own test labels are not public. glue-t5 is its variant for T5. config_name names the task, or else "
        "the last part of the path.",
    )
    text: str | None = Field(
        None, description="Classification: the text's column. Instruction: a column of texts to learn as they are."
    )
    text_pair: str | None = Field(None, description="Classification of pairs: the second text's column.")
    label: str | list[str] | None = Field(
        None,
        description="Classification: the label's column. Several labels a row: a column of lists, or the names of "
        "several columns of 0 and 1, or texts with a separator. Regression: a column of numbers. Preference: a "
        "column of true and false, whether the response is good.",
    )
    label_separator: str | None = Field(
        None,
        min_length=1,
        description="Classification: what separates several labels in one text, such as '|'. list: they are a list in "
        "brackets. none: each text is one label. Default: inferred from parts that recur, and shown.",
    )
    drop_missing: bool = Field(
        False, description="Leave out rows without a text or a label. Otherwise they are errors."
    )
    tokens: str | None = Field(None, description="Token classification: the column with each row's list of words.")
    tags: str | None = Field(None, description="Token classification: the column with each word's tag.")
    prefix: str | None = Field(
        None,
        description="Text to text: a prefix such as 'mrpc'. Each text then follows its column's name, as in T5's "
        "training. Default: the texts alone.",
    )
    prompt: str | None = Field(
        None, description="Instruction: the prompt's column. E2E: the meaning representation's."
    )
    response: str | None = Field(None, description="Instruction: the response's column. E2E: the text's.")
    messages: str | None = Field(
        None,
        description="Instruction: the column with a chat, a list of {'role': ..., 'content': ...}, or ShareGPT's "
        "{'from': ..., 'value': ...}.",
    )
    system: str | None = Field(
        None, description="Instruction: the column with a system message, for rows that have none in their chat."
    )
    chosen: str | None = Field(
        None, description="Preference: the column with the better answer, a text, messages, or a whole chat."
    )
    rejected: str | None = Field(None, description="Preference: the column with the worse answer.")
    tools: str | None = Field(
        None, description="Instruction: the column with the tools that a chat may call, a list of JSON schemas."
    )
    chat_template: str = Field(
        "auto",
        validation_alias=AliasChoices("chat_template", "template"),  # its name in older runs
        description="Instruction: how a chat becomes text. auto: by the tokenizer's chat template, or plain if there "
        "is none. plain: the RED paper's 'Human: ...', an empty line, 'Assistant: ...'. Or a Jinja file, one of TRL's "
        "templates (qwen3, llama3, ...), or a model whose template is taken; it is saved with the adapter.",
    )
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the training rows that become the validation split if there is none.",
    )
    group: str | None = Field(
        None,
        description="The column that says which rows belong together, such as a document or a customer. They are not "
        "separated by a limit, or by a validation split taken from the training rows. Default: rows with the same "
        "question belong together, or rows of one document if there is a column document_id or doc_id; in a mix "
        "that has to be named.",
    )
    max_train_rows: int | None = Field(
        None, ge=1, description="Train on at most this many rows, in whole groups, drawn by the seed."
    )
    max_eval_rows: int | None = Field(
        None, ge=1, description="Validate and test on at most this many rows each, in whole groups, drawn by the seed."
    )

    @field_validator(*COLUMN_FIELDS, mode="before")
    @classmethod
    def _column_by_number(cls, value: Any) -> Any:
        """A column that is called 2019 is a number to YAML."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("mix", mode="before")
    @classmethod
    def _parts_by_path(cls, value: Any) -> Any:
        return (
            [{"path": part} if isinstance(part, str) else part for part in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _has_a_source(self) -> DataConfig:
        if not (self.path or self.train or self.mix):
            raise ValueError("no data: give `path`, `train` or `mix`")
        own = [name for name in (*SOURCE_FIELDS, *COLUMN_FIELDS, "protocol") if self.mix and getattr(self, name)]
        if own:
            raise ValueError(f"with `mix`, each data set of it has its own `{own[0]}`")
        for number, part in enumerate(self.mix or (), start=1):
            if unknown := part.keys() - {*SOURCE_FIELDS, *COLUMN_FIELDS, "weight"}:
                raise ValueError(f"data set {number} of `mix` has an unknown field {min(unknown)!r}")
            weight = part.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"data set {number} of `mix` has the weight {weight!r}: give a number above 0")
            try:
                self._part(part)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join([f"data set {number} of `mix`", *map(str, problem["loc"])])
                raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
        return self

    @property
    def parts(self) -> list[DataConfig]:
        """The data sets of a mix, each as if it were the only one, without the limits of the mix."""
        return [self._part(part) for part in self.mix or ()]

    @property
    def weights(self) -> list[float]:
        """The share of each data set in the rows of a mix."""
        weights = [part.get("weight", 1) for part in self.mix or ()]
        return [weight / sum(weights) for weight in weights]

    def _part(self, fields: dict[str, Any]) -> DataConfig:
        shared = self.model_dump(exclude={"mix", "max_train_rows", "max_eval_rows"})
        return DataConfig(**shared | {name: value for name, value in fields.items() if name != "weight"})


class Task(ABC):
    """A task with its columns and labels, as task.json holds it. Subclasses are dataclasses.

    Attributes:
        name: its name in a recipe.
        task_type: PEFT's name for this kind of task. "SEQ_CLS" and "TOKEN_CLS" have a head, which is always trained.
        group: what rows share that ask the same, such as "prompt". No such group is split between training and
            validation.
        recipe_fields: the fields of a recipe that this task has and not every task.
        recipe_defaults: what fields of a recipe are that it does not give, if that depends on the task.
        losses: of TRL's losses, those that a recipe may name. Fleets do not have them.
        rate_divisor: by what the method's default learning rate is divided.
        max_length: the longest row in tokens, if a recipe does not say it.
        by_trl: whether one of TRL's trainers trains it. TRL brings its own collator.
        default_columns: the columns of rows to answer with an adapter without its run; {} if that is not possible.
        generation: None if answers come from logits. Otherwise the arguments of `generate`; then `compute_metrics` and
            `decode` get texts.
        own_limits: at which lengths the task always cuts rows, for messages.
        columns: the names of the task's columns in the data.
        metric: the score that chooses the best epoch.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    group: ClassVar[str]
    recipe_fields: ClassVar[Collection[str]] = ()
    recipe_defaults: ClassVar[Mapping[str, Any]] = {}
    losses: ClassVar[Sequence[str]] = ()
    rate_divisor: ClassVar[float] = 1
    max_length: ClassVar[int] = 256
    by_trl: ClassVar[bool] = False
    default_columns: ClassVar[Mapping[str, str]] = {}
    generation: ClassVar[dict[str, Any] | None] = None
    own_limits: ClassVar[str] = ""
    columns: dict[str, Any]
    metric: str

    # --- from data ---

    @classmethod
    @abstractmethod
    def from_splits(cls, splits: dict[str, Dataset], data: DataConfig, *, metric: str | None = None) -> Task:
        """The task of this data. Columns that `data` does not name are guessed, and every row is checked. Further
        arguments: the task's `recipe_fields` that are about data, if they are given.

        Raises:
            UserError: data that is wrong for this task.
        """

    @classmethod
    @abstractmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, Any]:
        """The columns that `data` names, and guesses for the others. Raises `UserError` for a column that does not
        exist."""

    @classmethod
    def without_run(cls, labels: Sequence[str]) -> Task:
        """The task of an adapter without its run. `labels`: a name for each row of its head, if it has one."""
        return cls(columns=dict(cls.default_columns), metric="loss")  # type: ignore[call-arg]

    @classmethod
    def in_common(cls, dataset: Dataset, columns: dict[str, Any]) -> Dataset:
        """The task's columns of a data set alone, under the names of their keys, so that data sets can be mixed."""
        from redpeft.tasks.columns import keep_columns  # only here: it imports datasets

        return keep_columns(dataset, columns)

    def unread(self, dataset: Dataset) -> list[str]:
        """The user's columns that the task does not read."""
        from redpeft.tasks.columns import unread_columns  # only here: it imports datasets

        return unread_columns(dataset, self.columns)

    @abstractmethod
    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column or a wrong row."""

    @abstractmethod
    def groups(self, dataset: Dataset) -> Sequence[Hashable]:
        """A key for each row. Rows that ask the same have the same key."""

    @property
    def strata(self) -> Callable[[Dataset], list[int]] | None:
        """A function of a dataset that gives each row's class, by which a validation split is balanced. None without
        classes."""
        return None

    def describe(self, dataset: Dataset) -> list[str]:
        """Lines for people, such as the labels and their counts."""
        return []

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The chat template to save with an adapter of this task, if it is not the base's own."""
        return tokenizer.chat_template

    @property
    def head_labels(self) -> Sequence[str]:
        """A name for each output of the task's head. Empty without a head, and for a head that gives a number."""
        return ()

    @property
    def shape(self) -> Hashable:
        """Equal for tasks of one kind if their models have the same shape and loss."""
        return len(self.head_labels)

    # --- to train and to score ---

    @abstractmethod
    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model with the task's head. `kwargs` go to `from_pretrained`."""

    @abstractmethod
    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """The rows in tokens, cut at `max_length`: "input_ids" and whatever else the model takes, "labels", and
        `columns.CUT`, which says which rows were cut."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What makes a batch of encoded rows. None if TRL brings its own."""

    compute_metrics: ClassVar[Any] = None
    """None: the loss alone. Otherwise a function of an `EvalPrediction` that gives the scores, `metric` among them."""

    @property
    def confusion(self) -> Callable[[Any], Any] | None:
        """A function of an `EvalPrediction` that counts rows by their label and the predicted one. None without
        classes."""
        return None

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger `metric` is better."""
        return self.metric not in LOWER_IS_BETTER

    # --- to answer ---

    @abstractmethod
    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to answer as a dataset: objects with the task's columns, or texts if one text is enough. `first`: the
        number of the first row."""

    @abstractmethod
    def decode(self, predictions: Any, dataset: Dataset, encoded: Dataset) -> list[dict[str, Any]]:
        """Answers from logits or generated texts: one JSON-able dict for each row."""

    unanswered: ClassVar[Any] = None
    """None, or a function of a dataset and the set of questions answered so far. It gives the rows to answer, where
    rows that ask the same get one answer."""

    score_answers: ClassVar[Any] = None
    """None, or a function of texts and a dataset that scores the texts as answers to `questions(dataset)`. It is
    called at the end of training for the test split, and by `redpeft evaluate`."""

    def questions(self, dataset: Dataset) -> Dataset:
        """The rows whose answers `score_answers` scores."""
        return dataset

    # --- on disk ---

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON-able fields, which `task_from_dict` reads."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]


class _Tasks(Mapping[str, type[Task]]):
    """The tasks by name. A task's module is imported when the task is first asked for."""

    _places: ClassVar[dict[str, str]] = {
        "classification": "redpeft.tasks.classification:ClassificationTask",
        "token-classification": "redpeft.tasks.token_classification:TokenClassificationTask",
        "instruction": "redpeft.tasks.instruction:InstructionTask",
        "preference": "redpeft.tasks.preference:PreferenceTask",
        "reward": "redpeft.tasks.reward:RewardTask",
        "e2e": "redpeft.tasks.e2e:E2ETask",
        "text-to-text": "redpeft.tasks.text_to_text:TextToTextTask",
    }

    def __getitem__(self, name: str) -> type[Task]:
        return resolve_name(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


TASKS = _Tasks()


def task_from_dict(values: dict) -> Task:
    """The task that `to_dict` described.

    Raises:
        UserError: `values` is not the description of a task.
    """
    kind = values.get("task") if isinstance(values, dict) else None
    if kind is None or kind not in TASKS:
        raise UserError(f"not a saved task: 'task' is {kind!r}, and the tasks are {', '.join(TASKS)}")
    return TASKS[kind](**{key: value for key, value in values.items() if key != "task"})

"""What a recipe will train, before it runs: rows as the model will see them, their lengths, the steps, and time and
memory by a few of them."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console, ConsoleOptions
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from redpeft.console import counted, in_words
from redpeft.models import free_memory, peak_memory
from redpeft.tasks.base import Task
from redpeft.tasks.columns import values
from redpeft.tasks.metrics import IGNORED
from redpeft.training.recipe import Recipe
from redpeft.training.train import TrainingRun, check_recipe, set_up
from redpeft.training.trainer import answer_questions, as_batch, as_evaluated

EXAMPLES = 3
BINS = 10  # of the histogram
WARM_UP, STEPS, SECONDS = 3, 24, 20.0  # of the probe: steps that do not count, steps and seconds at most
BATCHES = 4  # that are scored
QUESTIONS = 8  # that are answered
LONGEST = 400  # characters of a part of a row that are shown
BAR = 40  # characters
GIB = 2**30


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of a row as text. `learned`: whether the loss counts them. `label`: of a single token."""

    text: str
    learned: bool
    label: str | None = None


@dataclass(frozen=True)
class Example:
    """A row as the model sees it. `answer`: the label to learn that is not a part of the text, if there is one."""

    parts: list[Part]
    tokens: int
    answer: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Panel]:
        """Learned parts are green, or in brackets where there are no colours."""
        before, after = ("", "") if console.color_system else ("[[", "]]")
        shown = Text()
        for part in self.parts:
            text = _shortened(part.text)
            shown.append(f"{before}{text}{after}" if part.learned else text, "bold green" if part.learned else "")
            if part.label is not None:
                shown.append(f"/{part.label}", "dim")
        if self.answer is not None:
            shown.append(" → ").append(f"{before}{_shortened(self.answer)}{after}", "bold green")
        yield Panel(shown, title=counted(self.tokens, "token"), title_align="left")


@dataclass(frozen=True)
class RunPreview:
    """A recipe before it runs.

    Attributes:
        notes: what training says of the data at its start: columns, counts of the classes, rows that are cut.
        examples: the first training rows.
        lengths: how many training rows have how many tokens: [first, last, rows], from short to long.
        rows, rows_cut, rows_left_out: by split, as result.json has them.
        trainable_parameters: with the head.
        steps, validations: at most, where there is early stopping.
        seconds: of training with its validations, which result.json calls the same.
        seconds_per_step, seconds_per_validation: parts of it.
        seconds_to_test: afterwards, with the test rows; 0 without.
        peak_bytes: of memory that was in use in the probe's first steps, which begin with the longest row.
        free_bytes: of memory before them.
    """

    notes: list[str]
    examples: list[Example]
    lengths: list[tuple[int, int, int]]
    rows: dict[str, int]
    rows_cut: dict[str, int]
    rows_left_out: dict[str, int]
    trainable_parameters: int
    steps: int
    validations: int
    seconds: float
    seconds_per_step: float
    seconds_per_validation: float
    seconds_to_test: float
    peak_bytes: int
    free_bytes: int


def preview(recipe: Recipe, folder: str | Path | None = None) -> RunPreview:
    """What training this recipe (in `folder`, if given) will do, by the same code, with a few steps as a probe.
    Nothing is written.

    Raises `UserError` and `RunError` as `train` does before its first step.
    """
    recipe = recipe.alone()
    if folder is not None:
        recipe.result_in(Path(folder))
    check_recipe(recipe)
    recipe = recipe.model_copy(update={"report_to": [], "save_steps": None})
    notes: list[str] = []
    if recipe.reward:
        notes.append("nothing is marked: the model learns from its own answers to these prompts")
    if recipe.trainer_options.get("use_vllm"):
        recipe = recipe.without_vllm()
        notes.append("answers come from vLLM in training, and from transformers in this probe, which takes longer")
    with tempfile.TemporaryDirectory() as temporary:
        run, trainer = set_up(recipe, Path(temporary) / "run", notes.append)
        examples = [
            example
            for row in range(min(EXAMPLES, len(trainer.train_dataset)))
            for example in _examples(run.task, run.learner.tokenizer, as_batch(trainer, [row]))
        ]
        free = free_memory(trainer.args.device)
        probe = _probe(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scores on few rows
            validation = _seconds_to_score(trainer, trainer.eval_dataset)
        return RunPreview(
            notes=notes,
            examples=examples,
            lengths=_histogram([len(ids) for ids in values(run.encoded["train"], "input_ids")]),
            rows={name: len(split) for name, split in run.splits.items()},
            rows_cut=run.rows_cut,
            rows_left_out=run.rows_left_out,
            trainable_parameters=sum(p.numel() for p in run.learner.model.parameters() if p.requires_grad),
            steps=trainer.state.max_steps,
            validations=trainer.state.num_train_epochs,
            seconds=trainer.state.max_steps * probe.seconds_per_step + trainer.state.num_train_epochs * validation,
            seconds_per_step=probe.seconds_per_step,
            seconds_per_validation=validation,
            seconds_to_test=_seconds_to_test(run, trainer) if "test" in run.encoded else 0.0,
            peak_bytes=max(probe.peak),
            free_bytes=free,
        )


# --- rows ------------------------------------------------------------------------------------------------------------


def _examples(task: Task, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> Iterator[Example]:
    """The row of a batch of one, in the parts that the kind of its task tells apart. A pair of answers is two."""
    if "completion_mask" in batch:  # preferences
        labelled = ["desirable" if good else "undesirable" for good in batch.get("label", ())]
        for place, verdict in enumerate(labelled or ["chosen", "rejected"]):
            real = batch["attention_mask"][place] == 1
            ids, learned = (batch[name][place][real].tolist() for name in ("input_ids", "completion_mask"))
            parts = _parts(tokenizer, ids, [mark == 1 for mark in learned], [None] * len(ids))
            yield Example(list(parts), len(ids), verdict)
        return
    ids = batch["input_ids"][0].tolist()
    if "labels" not in batch:  # rewards: the answers are the model's own
        yield Example(list(_parts(tokenizer, ids, [False] * len(ids), [None] * len(ids))), len(ids), None)
        return
    labels = batch["labels"][0].tolist()
    answer, names, marks = None, list(task.head_labels), [False] * len(ids)
    token_labels: list[str | None] = [None] * len(ids)
    if task.task_type == "SEQ_2_SEQ_LM":
        answer = tokenizer.decode([label for label in labels if label != IGNORED])
    elif task.task_type == "SEQ_CLS" and isinstance(labels, list):
        answer = ", ".join(name for name, has in zip(names, labels, strict=True) if has) or "no label"
    elif task.task_type == "SEQ_CLS":
        answer = names[labels] if names else f"{labels:g}"
    else:
        marks = [label != IGNORED for label in labels]
    if task.task_type == "TOKEN_CLS":
        token_labels = [names[label] if mark else None for label, mark in zip(labels, marks, strict=True)]
    yield Example(list(_parts(tokenizer, ids, marks, token_labels)), len(ids), answer)


def _parts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], marks: list[bool], labels: list[str | None]
) -> Iterator[Part]:
    """Tokens in parts that are learned or not; a token with a label is a part of its own."""
    before = ""
    for end in range(1, len(ids) + 1):
        here = marks[end - 1], labels[end - 1]
        if end < len(ids) and here[1] is None and here == (marks[end], labels[end]):
            continue
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)  # of a part alone it has other spaces
        yield Part(text[len(before) :], *here)
        before = text


def _histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """First length, last length and rows of each bin."""
    width = -(-(max(lengths) - min(lengths) + 1) // BINS)
    edges = list(range(min(lengths), max(lengths) + width + 1, width))
    counts, _ = np.histogram(lengths, edges)
    return [(start, start + width - 1, int(count)) for start, count in zip(edges, counts, strict=False)]


# --- the probe -------------------------------------------------------------------------------------------------------


class Probe(TrainerCallback):
    """Ends training after a few steps, without validation and checkpoint.

    `times`: when training began and when each step ended. `peak`: bytes in use in the first steps, which do not count
    for the time, as watching the memory takes some.
    """

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self.watching = ExitStack()
        self.peak = self.watching.enter_context(peak_memory(device))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())
        steps = len(self.times) - 1
        if steps == WARM_UP:
            self.watching.close()
        if steps >= STEPS or (steps > WARM_UP and self.times[-1] - self.times[0] > SECONDS):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = control.should_save = False

    @property
    def seconds_per_step(self) -> float:
        """The mean."""
        warm = self.times[min(WARM_UP, len(self.times) - 2) :]
        return (warm[-1] - warm[0]) / (len(warm) - 1)


def _probe(trainer: Any) -> Probe:
    """A few steps of training, of which the first takes the batch with the longest row."""
    lengths = [len(ids) for ids in values(trainer.train_dataset, "input_ids")]
    order, size = list(trainer.order), trainer.order.batch_size
    starts = range(0, len(order) - size + 1, size)
    first = max(starts, key=lambda start: max(lengths[row] for row in order[start : start + size]), default=0)
    trainer.order = [*order[first : first + size], *order[:first], *order[first + size :]]
    probe = Probe(trainer.args.device)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(probe)
    with probe.watching:
        trainer.train()
    return probe


def _seconds_to_score(trainer: Any, rows: Dataset) -> float:
    """For all rows, by some of all lengths."""
    few = rows.select(_spread(len(rows), BATCHES * trainer.args.per_device_eval_batch_size))
    trainer.evaluate(few.select([0]))  # the first time takes longer
    began = time.perf_counter()
    trainer.evaluate(few)
    return (time.perf_counter() - began) * len(rows) / len(few)


def _seconds_to_test(run: TrainingRun, trainer: Any) -> float:
    seconds = _seconds_to_score(trainer, as_evaluated(trainer, run.encoded["test"]))
    if run.task.score_answers is None:
        return seconds
    questions = len(run.task.questions(run.splits["test"]))
    few = run.splits["test"].select(_spread(len(run.splits["test"]), QUESTIONS))
    began = time.perf_counter()
    answer_questions(trainer, run.task, few, run.recipe.max_length)
    return seconds + (time.perf_counter() - began) * questions / len(run.task.questions(few))


def _spread(rows: int, at_most: int) -> Sequence[int]:
    """Places of rows, as far apart as fits."""
    return range(0, rows, -(-rows // at_most))


# --- for people ------------------------------------------------------------------------------------------------------


def shown(found: RunPreview) -> list[Any]:
    """A preview as rich prints it."""
    table = Table("tokens", "training rows", "")
    table.columns[1].justify = "right"
    most = max(rows for _, _, rows in found.lengths)
    for first, last, rows in found.lengths:
        table.add_row(f"{first}-{last}" if last > first else str(first), f"{rows:,}", "█" * round(BAR * rows / most))
    validations = f"{counted(found.validations, 'validation')} of {found.seconds_per_validation:.2g} s"
    test = f"; then the test rows take {in_words(found.seconds_to_test)}" if found.seconds_to_test else ""
    return [
        *found.notes,
        "The first rows as the model will see them; what it learns is green, or in [[brackets]]:",
        *found.examples,
        table,
        f"Trains {found.trainable_parameters:,} parameters.",
        f"Time: about {in_words(found.seconds)}: {counted(found.steps, 'step')} of {found.seconds_per_step:.2g} s, "
        f"{validations}{test}.",
        f"Memory: {found.peak_bytes / GIB:.1f} GiB in use at most; {found.free_bytes / GIB:.1f} GiB were free before.",
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"

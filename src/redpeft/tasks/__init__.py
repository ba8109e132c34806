"""What is learned and how it is scored. Every task offers the same attributes, so training has no case for each.

task, splits = read_data("classification", data_config, seed, **options)     # reads files, and does what follows
task = TASKS["classification"].from_splits(splits, data_config, **options)   # guesses columns, validates every row
task.groups(dataset)                # a key for each row, the same for rows that ask the same: `task.group` names it
task.strata                         # None, or a function of a dataset that gives the class of each row
task.describe(dataset)              # lines for people: labels and their counts
task.columns, task.metric, task.greater_is_better
model = task.load_model(base, tokenizer, **from_pretrained_kwargs)
encoded = task.encode(dataset, tokenizer, max_length)                        # with_labels=False: rows to predict;
                                                                             # the column CUT says which were too long
task.collator(tokenizer)                                                     # None where TRL brings its own
task.compute_metrics(prediction)                                             # None: the loss alone
task.confusion                      # None, or a function of a prediction: how often each label was given which
task.decode(predictions, dataset, encoded)                                   # one JSON-able dict a row
task_from_dict(task.to_dict())                                               # the same task, without the data

What differs where a model answers with texts (None, or absent where that is None, for the others):

task.generation                     # None: answers are logits. Otherwise the arguments of `generate` that give a text;
                                    # `compute_metrics` then gets texts, expected and generated, and `decode` texts
task.unanswered(dataset, answered)  # rows to answer, where rows with equal prompts get one answer
task.own_limits                     # text: at which lengths the task cuts rows whatever the model reads
task.score_answers(texts, dataset)  # scores beside the loss of the answers to `task.questions(dataset)`: at the end of
                                    # training on the test split, and in `redpeft evaluate`
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from redpeft.errors import UserError
from redpeft.tasks.classification import ClassificationTask
from redpeft.tasks.columns import Missing
from redpeft.tasks.data import DataConfig, read_evaluation, read_splits
from redpeft.tasks.e2e import E2ETask
from redpeft.tasks.files import read_file
from redpeft.tasks.instruction import InstructionTask
from redpeft.tasks.rows import choose_rows, leave_out_missing
from redpeft.tasks.text_to_text import TextToTextTask
from redpeft.tasks.token_classification import TokenClassificationTask

Task = ClassificationTask | TokenClassificationTask | InstructionTask | E2ETask | TextToTextTask
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ClassificationTask, TokenClassificationTask, InstructionTask, E2ETask, TextToTextTask)
}


def read_data(kind: str, data: DataConfig, seed: int = 0, **options: Any) -> tuple[Task, dict[str, Dataset]]:
    """The task that `data` is for, and its splits "train", "validation" and, where there is one, "test".

    The task (its columns, problem type and labels) comes from all training rows, before a validation split or a limit
    takes some away.

    Raises:
        UserError: data that is missing, empty, unreadable, or wrong for this task.
    """
    splits = read_splits(data, seed)
    if data.drop_missing:
        columns = TASKS[kind].find_columns(splits["train"], data)
        splits = {name: leave_out_missing(split, columns) for name, split in splits.items()}
    try:
        task = TASKS[kind].from_splits(splits, data, **options)
    except Missing as error:
        raise UserError(f"{error}; data.drop_missing=true leaves such rows out") from None
    return task, choose_rows(splits, task, data, seed)


def task_from_dict(values: dict) -> Task:
    """The task that `to_dict` described.

    Raises:
        UserError: `values` is not the description of a task.
    """
    kind = values.get("task") if isinstance(values, dict) else None
    if kind not in TASKS:
        raise UserError(f"not a saved task: 'task' is {kind!r}, and the tasks are {', '.join(TASKS)}")
    return TASKS[kind].from_dict(values)


__all__ = [
    "TASKS",
    "ClassificationTask",
    "DataConfig",
    "E2ETask",
    "InstructionTask",
    "Task",
    "TextToTextTask",
    "TokenClassificationTask",
    "leave_out_missing",
    "read_data",
    "read_evaluation",
    "read_file",
    "read_splits",
    "task_from_dict",
]

"""Use a finished run: score it on data, or let it label or answer rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from redpeft.adapters.folder import read_config, read_tensors
from redpeft.console import Progress, bars_on_terminals_only, log_main, no_bars
from redpeft.errors import UserError
from redpeft.models import autocast, choose_precision, find_base, load_config, pad_prompts
from redpeft.storage import CONFIG_NAME, RECIPE, RESULT, TASK, read_json
from redpeft.tasks.base import TASKS, DataConfig, task_from_dict
from redpeft.tasks.columns import ROW, values, where, with_columns
from redpeft.tasks.data import read_evaluation, share_columns
from redpeft.tasks.rows import leave_out_missing
from redpeft.training.baselines import METHODS
from redpeft.training.callbacks import plain_scores, show_progress
from redpeft.training.encoding import by_length, encode, encode_questions
from redpeft.training.learner import load_base, load_trained
from redpeft.training.recipe import Recipe, load_recipe
from redpeft.training.stdin_rows import Row, batched
from redpeft.training.trainer import answer_scores, as_scored, new_tokens, new_trainer

BATCH = 32


@dataclass
class FinishedRun:
    """A finished run, ready to use. The model is loaded when it is first needed, or by `load_run`.

    `folder`: the run folder, or an adapter folder; None for the base model of the recipe as it is, to compare with.
    """

    folder: Path | None
    recipe: Recipe
    task: Any

    @property
    def model(self) -> Any:
        """The model in evaluation mode, on the GPU where there is one."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that it was trained with."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Any, PreTrainedTokenizerBase]:
        if self.folder is None:
            model, tokenizer = load_base(self.recipe, self.task)
        else:
            model, tokenizer = load_trained(self.recipe, self.folder, self.task)
        if torch.cuda.is_available() and self.recipe.base.load_in is None:
            model = model.to("cuda")
        return model.eval(), tokenizer


METHOD_OF = {method.peft_type: name for name, method in METHODS.items() if method.peft_type}


def open_run(folder: str | Path, base: str | Path | None = None, task: str | None = None) -> FinishedRun:
    """A finished run, or an adapter folder without its run. The model is loaded when it is first needed, so that wrong
    rows are found without waiting for it.

    Args:
        folder: a run folder or an adapter folder.
        base: the base model, if it is not where the recipe or the adapter says.
        task: the task of an adapter, if neither its task.json (which `redpeft compose` writes) nor its task type says
            it.

    Raises `UserError` for a folder without a finished run or an adapter, and for an adapter that needs `base` or
    `task`.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file() and (folder / CONFIG_NAME).is_file():
        bars_on_terminals_only()
        return _open_adapter(folder, base, task)
    if not (folder / RECIPE).is_file():
        seeds = sorted(path.parent.name for path in folder.glob(f"seed-*/{RECIPE}"))
        raise UserError(
            f"{folder} holds one run for each seed: choose {', '.join(seeds)}"
            if seeds
            else f"{folder} is no run folder: it has no {RECIPE}"
        )
    if not (folder / RESULT).is_file():
        raise UserError(f"the run in {folder} is not finished: run the same `redpeft train` command again")
    bars_on_terminals_only()
    recipe = load_recipe(folder / RECIPE, {"base.model": str(base)} if base is not None else None)
    return FinishedRun(folder, recipe.resolved(), task_from_dict(read_json(folder / TASK)))  # with fields that are new


def _open_adapter(folder: Path, base: str | Path | None, name: str | None) -> FinishedRun:
    """An adapter folder without its run."""
    config = read_config(folder)
    model = base or config.get("base_model_name_or_path")
    if not model:
        raise UserError(f"{folder} does not name its base model: give it with --base")
    if config["peft_type"] not in METHOD_OF:
        kinds = ", ".join(METHOD_OF)
        raise UserError(f"{folder}: a {config['peft_type']} adapter needs its run folder (those without: {kinds})")
    if (folder / TASK).is_file():
        task = task_from_dict(read_json(folder / TASK))
    else:
        usable = {each: TASKS[each] for each in TASKS if TASKS[each].default_columns}
        kind = config.get("task_type")
        name = name or next((each for each in usable if usable[each].task_type == kind), None)
        if name not in usable:
            what = "does not say what it was trained for" if name is None else f"cannot be used for the task {name}"
            raise UserError(f"{folder} {what}: give --task, one of {', '.join(usable)}")
        has_head = usable[name].task_type.endswith("_CLS")
        task = usable[name].without_run(_labels(folder, str(model)) if has_head else [])
    fields = {"base.model": str(model), "data.path": str(folder), "task": task.name}
    return FinishedRun(
        folder, load_recipe(None, {**fields, "method": METHOD_OF[config["peft_type"]]}).resolved(), task
    )


def _labels(folder: Path, model: str) -> list[str]:
    """A name for each row of a classifier's head: the base's labels if it has as many, or else numbers."""
    own = tuple(f".{kind.lower()}_" for kind in METHOD_OF)
    heads = [tensor for name, tensor in read_tensors(folder).items() if not any(part in name for part in own)]
    if not heads:
        raise UserError(f"{folder} has no head, so it cannot predict labels: redpeft compose --head adds one")
    count = min(len(tensor) for tensor in heads)
    find_base(model)
    known = getattr(load_config(model), "id2label", None) or {}
    return [known[index] for index in range(count)] if len(known) == count else [str(index) for index in range(count)]


def load_run(folder: str | Path, base: str | Path | None = None) -> FinishedRun:
    """`open_run`, with the model loaded at once. Raises `UserError` also for a base that it was not trained on."""
    run = open_run(folder, base)
    _ = run.model
    return run


def evaluate(run: FinishedRun, data: str | Path, config_name: str | None = None) -> dict[str, Any]:
    """The task's scores on the rows of a file, or on the test split (else the validation split) of a folder or hub
    data set.

    For rows with one label each there is also a "confusion_matrix" with "true" and "predicted" labels and their
    "counts". For generated labels "predicted" ends with None, which counts texts that are not a label.

    `config_name` is the configuration of a hub data set. The rows are checked before the model is loaded. Rows without
    a text or a label are left out if the recipe says so.
    """
    generate = run.recipe.data.generate if str(data) == run.recipe.data.path else None
    dataset = read_evaluation(str(data), config_name, run.recipe.data.header or "first", generate)
    if run.recipe.data.mix:  # a file of the mix, or any other that could be in it
        own = (
            part for part in run.recipe.data.parts if str(data) in (part.path, part.train, part.validation, part.test)
        )
        dataset = share_columns(run.task.name, dataset, next(own, DataConfig(path=str(data))))
    dataset = with_columns(dataset, run.task.columns)
    if run.recipe.data.drop_missing:
        dataset = leave_out_missing(dataset, run.task.columns)
    run.task.check(dataset)
    if run.task.score_answers is not None:
        run.task.questions(dataset)  # raises now if a package for the scores is missing
    encoded = encode(run.task, dataset, run.model, run.tokenizer, run.recipe.max_length, run.recipe.learn_prompt)
    if encoded.note:
        log_main(encoded.note)
    recipe = run.recipe.without_vllm().model_copy(update={"report_to": []})
    with tempfile.TemporaryDirectory() as folder:
        scored = by_length(encoded.rows)  # the same batches as in training
        trainer = new_trainer(recipe, Path(folder), run.task, run.model, run.tokenizer, encoded.rows, scored)
        show_progress(trainer)
        scores = answer_scores(trainer, run.task, dataset, recipe.max_length)
        if run.task.confusion is None:
            return {**plain_scores(trainer.evaluate(), "eval_"), **scores}
        found = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        names, counts = list(run.task.head_labels), run.task.confusion(as_scored(run.task, run.tokenizer, found))
        matrix = {
            "true": names,
            "predicted": [*names, *[None] * (len(counts) - len(names))],
            "counts": counts[: len(names)].tolist(),
        }
        return {**plain_scores(found.metrics, "eval_"), **scores, "confusion_matrix": matrix}


def predict(
    run: FinishedRun, rows: Iterable[dict[str, Any] | str], batch_size: int = BATCH, max_new_tokens: int | None = None
) -> Iterator[dict[str, Any]]:
    """One answer for each row, in order, as the rows come in: labels and probabilities, a value, or a generated text.

    Rows are objects with the task's columns, or plain texts if the task needs one text. An answer starts with its
    row's `id`, or else with the columns that were read, so that rows and answers can be joined. Data to text answers
    each distinct meaning representation once, at its first row. `max_new_tokens` limits generated texts; default: the
    task's own limit.
    """
    total = len(rows) if isinstance(rows, Sized) else None
    found = answer_batches(run, batched(rows, batch_size), max_new_tokens, total)
    return ({**identity(row, read), **answer} for row, read, answer in found)


def answer_batches(
    run: FinishedRun,
    batches: Iterable[list[Row]],
    max_new_tokens: int | None = None,
    total: int | None = None,
    source: str | None = None,
) -> Iterator[tuple[Row, dict[str, Any], dict[str, Any]]]:
    """Each row, the columns that were read of it, and its answer. The rows come in lists; the model gets one list at a
    time. `total`: the number of rows, if it is known. `source`: the name of the rows in messages."""
    first, answered = 1, set[str]()
    progress = Progress()
    notes: dict[str, int] = {}  # how often each note was made

    def note(what: str, dataset: Dataset, rows: np.ndarray) -> None:
        if len(rows):
            if what not in notes:
                log_main(f"{where(dataset, int(rows[0]))}: {what}")
            notes[what] = notes.get(what, 0) + len(rows)

    for batch in batches:
        dataset = run.task.rows_to_dataset(batch, first)
        dataset.info.description = source or ""
        run.task.check(dataset, with_labels=False)
        first += len(batch)
        if run.task.unanswered is not None:
            new = run.task.unanswered(dataset, answered)
            if not new:
                continue
            batch, dataset = [batch[index] for index in new], dataset.select(new)
        precision = choose_precision(run.recipe.precision, run.recipe.base.dtype)
        with torch.inference_mode(), autocast(precision, run.model.device), no_bars():
            encoded = encode_questions(run.task, dataset, run.model, run.tokenizer, run.recipe.max_length)
            note(f"longer than {encoded.limit.source}{run.task.own_limits}, cut", dataset, np.flatnonzero(encoded.cut))
            if run.task.generation is None:
                answers = _label(run, dataset, encoded.rows)
            else:
                prompts = values(encoded.rows, "input_ids")
                asked = max_new_tokens or run.task.generation["max_new_tokens"]
                room = [new_tokens(run.model, run.tokenizer, asked, len(prompt)) for prompt in prompts]
                note(f"room for fewer than {asked} new tokens", dataset, np.flatnonzero(np.array(room) < asked))
                answers = run.task.decode(_generate(run, prompts, room))
        yield from zip(batch, dataset, answers, strict=True)
        if total is not None:
            progress.show("row", first - 1, total)
    for what, rows in notes.items():
        if rows > 1:
            log_main(f"{rows:,} of {first - 1:,} rows: {what}")


def identity(row: Row, read: dict[str, Any]) -> dict[str, Any]:
    """The fields that tell to which row an answer belongs."""
    if isinstance(row, dict) and row.get("id") is not None:
        return {"id": row["id"]}
    return {name: value for name, value in read.items() if name != ROW and value is not None}


def _label(run: FinishedRun, dataset: Dataset, encoded: Dataset) -> list[dict[str, Any]]:
    inputs = run.task.collator(run.tokenizer)(list(encoded)).to(run.model.device)
    inputs.pop("labels", None)
    return run.task.decode(run.model(**inputs).logits.float().cpu().numpy(), dataset, encoded)


def _generate(run: FinishedRun, prompts: list[list[int]], new_tokens: list[int]) -> list[str]:
    """The answers to prompts in tokens, with at most `new_tokens` new tokens each. Prompts with the same limit go
    through the model together: the limit of another row would change their answers."""
    tokenizer, model = run.tokenizer, run.model
    decodes = not model.config.is_encoder_decoder
    texts = [""] * len(prompts)
    for room in set(new_tokens):
        rows = [row for row, new in enumerate(new_tokens) if new == room]
        inputs = pad_prompts(tokenizer, [prompts[row] for row in rows], "left" if decodes else "right")
        tokens = model.generate(**inputs.to(model.device), **run.task.generation | {"max_new_tokens": room})
        if decodes:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            texts[row] = text
    return texts

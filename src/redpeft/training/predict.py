"""Use a finished run: score it on data, or let it label or answer rows."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from redpeft.adapters.files import load_adapter
from redpeft.errors import UserError
from redpeft.tasks import DataConfig, Task, read_evaluation, task_from_dict
from redpeft.training.base import autocast, load_base
from redpeft.training.recipe import Recipe, load_recipe
from redpeft.training.train import (
    ADAPTER,
    MODEL,
    RECIPE,
    RESULT,
    TASK,
    TRAINED,
    arguments,
    plain_scores,
    trainer_classes,
)

BATCH = 32


@dataclass
class Run:
    """A finished run, ready to use."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    task: Any
    recipe: Recipe


def load_run(folder: str | Path, base: str | Path | None = None) -> Run:
    """The trained model of a run folder, on the GPU where there is one.

    `base` is where the base model lies now, if not where the recipe says. Raises `UserError` for a folder that holds
    no finished run, or a base model that the adapter was not trained on.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file():
        seeds = sorted(path.parent.name for path in folder.glob(f"seed-*/{RECIPE}"))
        raise UserError(
            f"{folder} holds one run for each seed: choose {', '.join(seeds)}"
            if seeds
            else f"{folder} is no run folder: it has no {RECIPE}"
        )
    if not (folder / RESULT).is_file():
        raise UserError(f"the run in {folder} is not finished: run the same `redpeft train` command again")
    recipe = load_recipe(folder / RECIPE, {"base.model": str(base)} if base is not None else None)
    task = task_from_dict(json.loads((folder / TASK).read_text(encoding="utf-8")))
    model, tokenizer = _load_model(folder, recipe, task)
    if torch.cuda.is_available() and recipe.base.load_in is None:
        model = model.to("cuda")
    return Run(model.eval(), tokenizer, task, recipe)


def _load_model(folder: Path, recipe: Recipe, task: Task) -> tuple[Any, PreTrainedTokenizerBase]:
    if recipe.method == "full":
        trained = recipe.base.model_copy(update={"model": str(folder / MODEL), "revision": None})
        return load_base(recipe.model_copy(update={"base": trained}), task)
    base, _ = load_base(recipe, task)
    saved = folder / (MODEL if recipe.method in ("bitfit", "head") else ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    if recipe.method == "red":
        return load_adapter(base, saved), tokenizer
    if recipe.method in ("lora", "ia3"):
        return PeftModel.from_pretrained(base, saved), tokenizer
    _put_back(base, saved / TRAINED)
    return base, tokenizer


def _put_back(model: torch.nn.Module, path: Path) -> None:
    """Load what bitfit or head trained into the base model."""
    trained, own = load_file(path), dict(model.named_parameters())
    wrong = [name for name, tensor in trained.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise UserError(f"{path} was trained on another base model: {', '.join(wrong[:3])} do not fit this one")
    model.load_state_dict(trained, strict=False)


def evaluate(run: Run, data: str | Path | DataConfig) -> dict[str, float]:
    """The task's scores on a file's rows, or on the test (else validation) split of a folder or hub data set."""
    path = data if isinstance(data, DataConfig) else DataConfig.model_validate({"path": str(data)})
    dataset = read_evaluation(str(path.test or path.path or path.train), path.config_name)
    encoded = run.task.encode(dataset, run.tokenizer, run.recipe.max_length)
    recipe = run.recipe.model_copy(update={"report_to": []})
    trainer_class, arguments_class, extra = trainer_classes(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=run.model,
            args=arguments(recipe, Path(folder), run.task, arguments_class, extra),
            data_collator=run.task.collator(run.tokenizer),
            train_dataset=encoded,  # TRL wants one
            eval_dataset=encoded,
            processing_class=run.tokenizer,
            compute_metrics=run.task.compute_metrics,
        )
        return plain_scores(trainer.evaluate(), "eval_")


def predict(
    run: Run, rows: Iterable[dict[str, Any] | str], batch_size: int = BATCH, max_new_tokens: int = 256
) -> Iterator[dict[str, Any]]:
    """One dict for each row, in order, as the rows come in: labels and probabilities, a value, or a generated text.

    Rows are objects with the task's columns, or plain texts where one text is all that the task needs.
    """
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        dataset = run.task.rows_to_dataset(batch)
        with torch.inference_mode(), autocast(run.recipe, run.model.device):
            if run.task.name == "instruction":
                yield from run.task.decode(_generate(run, dataset, max_new_tokens))
            else:
                yield from _label(run, dataset)


def _label(run: Run, dataset: Dataset) -> list[dict[str, Any]]:
    encoded = run.task.encode(dataset, run.tokenizer, run.recipe.max_length, with_labels=False)
    inputs = run.task.collator(run.tokenizer)(list(encoded)).to(run.model.device)
    inputs.pop("labels", None)
    return run.task.decode(run.model(**inputs).logits.float().cpu().numpy(), dataset, encoded)


def _generate(run: Run, dataset: Dataset, max_new_tokens: int) -> list[str]:
    inputs = run.task.prompt_inputs(dataset, run.tokenizer).to(run.model.device)
    inputs.pop("token_type_ids", None)
    tokens = run.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return run.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

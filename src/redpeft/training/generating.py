"""Tasks that answer with texts: their Trainer, and the scores of what they generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Seq2SeqTrainer

from redpeft.models import input_limit, positions
from redpeft.tasks import Task
from redpeft.tasks.columns import values
from redpeft.tasks.metrics import IGNORED
from redpeft.training.encoding import encode_questions
from redpeft.training.recipe import Recipe


class GeneratingTrainer(Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer, generating by the arguments that the task says, for decoders too.

    `generation` are the arguments of `generate`. Where there is nothing to compute metrics with, `evaluate` gives the
    loss alone, and only `predict` generates: of rows without labels, padded on the left if the model is a decoder.
    """

    generation: dict[str, Any]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(*args, **{**self._fitting(0), **kwargs})

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        longest = max(len(ids) for ids in values(test_dataset, "input_ids"))
        return super().predict(test_dataset, *args, **{**self._fitting(longest), **kwargs})

    def _fitting(self, prompt: int) -> dict[str, Any]:
        asked = self.generation["max_new_tokens"]
        return {**self.generation, "max_new_tokens": new_tokens(self.model, self.processing_class, asked, prompt)}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Seq2SeqTrainer's own would count the rows again that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = vars(self.model.generation_config)
        before = dict(config)
        with self.accelerator.autocast():  # `generate` passes by the forward that accelerate wraps in it
            loss, tokens, labels = super().prediction_step(model, inputs, *args, **kwargs)
        config.update(before)  # Seq2SeqTrainer fills in defaults, which the next `generate` would warn of
        if tokens is not None and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :].contiguous()
        return loss, tokens, labels


def new_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, asked: int, prompt: int) -> int:
    """How many tokens to generate: those `asked` for, or what has a position behind a prompt of so many tokens."""
    if model.config.is_encoder_decoder:
        limit = positions(model, decoder=True)
        return asked if limit is None else min(asked, limit.tokens)
    return min(asked, input_limit(model, tokenizer).tokens - prompt)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> list[str]:
    """Texts of token ids of shape (rows, length); `IGNORED` pads them."""
    padded = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
    return tokenizer.batch_decode(padded, skip_special_tokens=True)


def as_scored(task: Task, tokenizer: PreTrainedTokenizerBase, prediction: Any) -> EvalPrediction:
    """A Trainer's prediction as the task takes it to score: logits and labels, or texts if the task generates."""
    found = EvalPrediction(prediction.predictions, prediction.label_ids)
    return found if task.generation is None else EvalPrediction(*(decode_tokens(tokenizer, each) for each in found))


def metrics_function(
    task: Task, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """What Trainer calls after an evaluation: the task's `compute_metrics`, given texts if the task generates."""
    compute = task.compute_metrics
    return compute and (lambda prediction: compute(as_scored(task, tokenizer, prediction)))


def answer_scores(trainer: Any, recipe: Recipe, task: Task, dataset: Dataset) -> dict[str, float | None]:
    """The scores of the answers to a dataset's questions, for tasks that are not scored row by row; {} for others.

    All processes generate, and the first one scores.
    """
    if task.score_answers is None:
        return {}
    tokenizer = trainer.processing_class
    questions = encode_questions(recipe, task, task.questions(dataset), trainer.model, tokenizer)
    texts = decode_tokens(tokenizer, trainer.predict(questions.rows).predictions)
    return task.score_answers(texts, dataset) if trainer.is_world_process_zero() else {}

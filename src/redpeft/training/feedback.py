"""What a run adds to TRL's trainers that learn from feedback: preferences (DPO, KTO) and rewards (GRPO)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import speed_metrics

from redpeft.adapters.folder import load_adapter
from redpeft.errors import UserError
from redpeft.models import end_tokens, input_limit, pad_prompts
from redpeft.storage import find_adapter
from redpeft.tasks.columns import values

if TYPE_CHECKING:
    from transformers import Trainer as Mixin
else:
    Mixin = object


class FeedbackTrainer(Mixin):
    """What a run adds to TRL's trainers that compare the policy with a reference.

    The reference is the policy at the start: the base with the adapter off, or the adapter `init_from`, frozen.
    """

    init_from: str | None

    def __init__(self, model: Any, **kwargs: Any) -> None:
        trained = {name: each.data for name, each in model.named_parameters() if each.requires_grad}
        super().__init__(model=model, **kwargs)
        for name, held in trained.items():
            model.get_parameter(name).data = held  # TRL makes them bf16 on a quantised base
        # TRL's reference is a copy of the adapter as it is now, which a finished run's is no longer
        if "ref" not in getattr(model, "peft_config", {}):
            return
        if self.init_from is None:
            model.delete_adapter("ref")
        else:
            load_adapter(model, find_adapter(self.init_from), adapter_name="ref")

    def log(self, *args: Any, **kwargs: Any) -> None:
        for scores in self._metrics.values():
            scores.pop("num_tokens", None)  # TRL counts from where a run was resumed
        super().log(*args, **kwargs)


class PreferenceTrainer(FeedbackTrainer):
    """What a run adds to TRL's `DPOTrainer` or `KTOTrainer`, which get their rows in tokens here."""

    data_collator: Any

    def __init__(self, model: Any, args: Any, processing_class: PreTrainedTokenizerBase, **kwargs: Any) -> None:
        args.max_length = input_limit(model, processing_class, args.max_length).tokens
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        if getattr(self, "calculate_KL", False):
            self.data_collator = partial(_with_answers_of_others, self.data_collator)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """TRL puts "eval_" before its own scores, whatever the prefix is."""
        found = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        own = {key: value for key, value in found.items() if not key.startswith("eval_")}
        return own | {f"{metric_key_prefix}_{key[5:]}": found[key] for key in found if key.startswith("eval_")}


def _with_answers_of_others(collate: Callable[[list], Any], rows: list[dict[str, Any]]) -> Any:
    """KTO also scores each prompt with the answer of the row before it. TRL pairs neighbours in the data's order, but
    here batches are drawn anew in each epoch."""
    answers = [row["completion_ids"] for row in rows]
    return collate([{**row, "KL_completion_ids": answers[place - 1]} for place, row in enumerate(rows)])


class RewardTrainer(FeedbackTrainer):
    """What a run adds to TRL's `GRPOTrainer`: prompts become tokens by the task, and a score is the reward of one
    greedy answer to each prompt."""

    control: Any

    def __init__(self, task: Any, **kwargs: Any) -> None:
        self.task = task
        super().__init__(reward_funcs=task.reward_functions(), **kwargs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.task.tokens_to_continue(prompts, self.processing_class), None, {}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._buffered_inputs is None:  # TRL counts from where a run was resumed, and rows from the start
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        return super()._prepare_inputs(generation_batch)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean reward, of each function too where there are several, and the answers' mean length in tokens."""
        rows, began = self.eval_dataset if eval_dataset is None else eval_dataset, time.time()
        self.model.eval()
        size, processes = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        batches = [rows.select(range(at, min(at + size, len(rows)))) for at in range(0, len(rows), size)]
        own = []
        for batch in batches[self.accelerator.process_index :: processes]:
            own += self._rewards_of_answers(batch)
            self.callback_handler.eval_dataloader = batches  # by which progress is counted
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rewards = np.array(gather_object(own), dtype=float)  # (rows, functions and the length)
        *means, length = np.nanmean(rewards, axis=0).tolist()
        weighted = np.nansum(rewards[:, :-1] * self.reward_weights.cpu().numpy(), axis=1)
        scores = {"reward": float(weighted.mean()), "completion_length": length}
        if len(means) > 1:
            scores |= {f"reward_{name}": mean for name, mean in zip(self.reward_func_names, means, strict=True)}
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rewards_of_answers(self, rows: Dataset) -> list[list[float | None]]:
        """For each row what each function gives its greedy answer, and the answer's length in tokens."""
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
        prompts = pad_prompts(tokenizer, values(rows, "input_ids"), "left").to(model.device)
        ends = end_tokens(model, tokenizer)
        with torch.inference_mode(), self.accelerator.autocast():
            tokens = model.generate(
                **prompts, **self.task.generation, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
            )
        answers = []
        for row in tokens[:, prompts["input_ids"].shape[1] :].tolist():
            length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:length])
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        columns = {name: values(rows, name) for name in rows.column_names if name != "prompt"}
        scores = [
            function(prompts=values(rows, "prompt"), completions=texts, completion_ids=answers, **columns)
            for function in self.reward_funcs
        ]
        return [[*of_row, len(answer)] for *of_row, answer in zip(*scores, answers, strict=True)]


class AnswerOrder(Sampler[int]):
    """The order of the prompts for TRL's `GRPOTrainer`: those of a step together, each as often as it is answered, and
    all that again for each time that TRL takes a part of these answers. An incomplete step is left out.

    Raises `UserError` if there are fewer prompts than a step takes.
    """

    def __init__(self, order: Any, trainer: Any) -> None:
        args = trainer.args
        self.order, self.answers = order, args.num_generations
        self.prompts = args.generation_batch_size // args.num_generations
        self.times = args.num_iterations * args.steps_per_generation
        self.batch_size = self.prompts * self.answers * self.times
        if len(order) < self.prompts:
            raise UserError(
                f"a step takes {self.prompts} prompts, and there are {len(order)}: choose a lower batch_size"
            )

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // self.prompts * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = list(self.order)
        for end in range(self.prompts, len(order) + 1, self.prompts):
            answered = [row for row in order[end - self.prompts : end] for _ in range(self.answers)]
            yield from answered * self.times

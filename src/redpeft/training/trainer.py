"""A recipe becomes transformers' Trainer, or TRL's: its arguments, its order of rows, its optimiser, its scores."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch
from datasets import Dataset
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from redpeft import calibrate
from redpeft.errors import RunError, UserError, did_you_mean, first_line
from redpeft.models import autocast, choose_precision, input_limit, pad_prompts, positions, training_device
from redpeft.storage import CHECKPOINTS, last_checkpoint
from redpeft.tasks.base import TASKS, Task
from redpeft.tasks.columns import values
from redpeft.tasks.metrics import IGNORED
from redpeft.training.encoding import encode_questions
from redpeft.training.feedback import AnswerOrder, PreferenceTrainer, RewardTrainer
from redpeft.training.learner import head_parameters
from redpeft.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer as Mixin
else:
    Mixin = object

CALIBRATION_ROWS = 32
EVALUATION_ROWS = 8  # at least, in a batch
MEGABATCH = 50  # batches, within which rows are sorted by length

# Gives completions, as TRL's GRPOTrainer asks for them: (prompts, trainer) -> prompt_ids, completion_ids and logprobs.
RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]


def make_trainer(
    recipe: Recipe,
    folder: Path,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Dataset],
    head: list[str],
    rollout_func: RolloutFunction | None = None,
) -> Any:
    """The Trainer of a run, with the units of RED measured. It is ready to train."""
    trainer = new_trainer(
        recipe, folder, task, model, tokenizer, encoded["train"], encoded["validation"], rollout_func
    )
    if recipe.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    if "tensorboard" in recipe.report_to and trainer.args.process_index == 0:
        trainer.add_callback(_tensorboard(folder))
    if task.task_type != "CAUSAL_LM":
        # By the signature of its forward, Trainer assumes that a model averages its loss over all pieces of a batch.
        # Classifiers and T5 do not, and would learn from the sum of the pieces' means.
        trainer.model_accepts_loss_kwargs = False
    rows = trainer.train_dataset
    if recipe.method == "red":
        with autocast(choose_precision(recipe.precision, recipe.base.dtype), model.device):
            # the first rows in the data's order, whatever the seed and the number of processes
            batch = as_batch(trainer, range(min(CALIBRATION_ROWS, len(rows))))
            if recipe.loss:  # TRL's batches hold more than a model takes
                batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
            calibrate(model, batch)
    order = epoch_order(recipe, rows)
    trainer.order = AnswerOrder(order, trainer) if recipe.reward else order
    trainer.head, trainer.head_lr = head_parameters(model, head).values(), recipe.head_lr
    return trainer


def new_trainer(
    recipe: Recipe,
    folder: Path,
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    validation: Dataset,
    rollout_func: RolloutFunction | None = None,
) -> Any:
    """A Trainer that can score rows. `make_trainer` makes it ready to train.

    Raises `UserError` for trainer_options that TRL refuses.
    """
    trainer_class, arguments_class, extra = trainer_classes(recipe)
    if recipe.packing:  # rows are packed up to this length, which the model may not have
        extra["max_length"] = input_limit(model, tokenizer, recipe.max_length).tokens
    if rollout_func is not None:
        recipe = recipe.without_vllm()
    own: dict[str, Any] = {
        "data_collator": task.collator(tokenizer),
        "compute_metrics": metrics_function(task, tokenizer),
    }
    if recipe.reward:
        own = {"task": task, "rollout_func": rollout_func}
    try:
        return trainer_class(
            model=model,
            args=arguments(recipe, folder, task, arguments_class, extra),
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
            **own,
        )
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        if not recipe.trainer_options or isinstance(error, UserError):
            raise
        raise UserError(f"trainer_options: {first_line(error)}") from error


def epoch_order(recipe: Recipe, rows: Dataset) -> EpochOrder:
    """The order in which a recipe takes its training rows, alone and in a fleet."""
    lengths = [len(ids) for ids in rows["input_ids"]] if recipe.group_by_length else None
    return EpochOrder(len(rows), recipe.batch_size, recipe.seed, lengths)


def as_evaluated(trainer: Any, rows: Dataset) -> Dataset:
    """Rows in the form that `trainer.evaluate` takes: TRL's trainer prepares only the rows that it is made with."""
    if not hasattr(trainer, "_prepare_dataset"):
        return rows
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "test")


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """transformers' callback, which writes into the run folder: the checkpoints are removed at the end."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))


def check_reporters(names: Iterable[str]) -> None:
    """Raises `UserError` if the package of one of `report_to` is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to {name}: pip install {name}")


def trainer_classes(recipe: Recipe) -> tuple[type, type, dict[str, Any]]:
    """The Trainer class of a run, the class of its arguments, and arguments that only this class has."""
    task = TASKS[recipe.task]
    if not task.by_trl:
        generation = task.generation
        if generation is None:
            return type("RunTrainer", (RunTrainer, Trainer), {}), TrainingArguments, {}
        run_trainer = type("RunGeneratingTrainer", (RunTrainer, GeneratingTrainer), {"generation": generation})
        return run_trainer, Seq2SeqTrainingArguments, {"predict_with_generate": True}
    try:
        import trl
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError(f"the task {task.name} needs TRL: pip install redpeft[trl]") from None
    if recipe.loss:
        kind = {"grpo": "GRPO", "kto": "KTO"}.get(recipe.loss, "DPO")
        trainer: Any = getattr(trl, f"{kind}Trainer", None)
        arguments_class: Any = getattr(trl, f"{kind}Config", None)
        if not hasattr(trainer, "_tokenize_prompts" if recipe.reward else "_compute_loss"):
            raise UserError(f"loss {recipe.loss} needs a newer TRL than {trl.__version__}: pip install -U trl")
        if recipe.loss == "kto" and rows_at_once(recipe) < 2:
            raise UserError("loss kto compares answers of one batch: each process needs at least 2 rows at a time")
        _check_trainer_options(recipe.trainer_options, arguments_class)
        extra: dict[str, Any] = {"beta": recipe.beta}
        if recipe.reward:
            extra |= {
                "num_generations": recipe.num_generations,
                "num_generations_eval": 1,
                "temperature": recipe.temperature,
                "max_completion_length": recipe.max_completion_length,
            }
        else:
            extra |= {
                "max_length": recipe.max_length,
                "loss_type": {"dpo": "sigmoid"}.get(recipe.loss, recipe.loss),
                "precompute_ref_log_probs": False,  # a finished run would be compared with itself
                "sync_ref_model": False,
            }
        bases = (RewardTrainer if recipe.reward else PreferenceTrainer, RunTrainer, trainer)
        return type(f"Run{kind}Trainer", bases, {"init_from": recipe.init_from}), arguments_class, extra
    extra = {
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "eval_packing": False,
        "completion_only_loss": not recipe.learn_prompt,
    }
    return type("RunSFTTrainer", (RunTrainer, SFTTrainer), {}), SFTConfig, extra


WITHOUT_EFFECT = {
    "DPOConfig": ("label_smoothing", "discopop_tau", "truncation_mode", "precompute_ref_batch_size"),
    "KTOConfig": ("precompute_ref_batch_size",),
}
"""Fields of TRL's arguments for losses that a recipe does not have, and for what is done here."""


def _check_trainer_options(options: dict[str, Any], cls: type) -> None:
    """Raises `UserError` for a name that is no field of TRL's arguments or one without effect, and for a value of
    another type."""
    known = get_type_hints(cls) if options else {}
    if unused := options.keys() & set(WITHOUT_EFFECT.get(cls.__name__, ())):
        raise UserError(f"trainer_options: {min(unused)} has no effect on the losses of a recipe: leave it out")
    for name, value in options.items():
        if name not in known:
            raise UserError(f"trainer_options: {cls.__name__} has no {name!r}{did_you_mean(name, known)}")
        try:
            TypeAdapter(known[name], config={"arbitrary_types_allowed": True}).validate_python(value, strict=False)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"]
            raise UserError(f"trainer_options: {name}: {wanted}, not {value!r}") from None


def rows_at_once(recipe: Recipe) -> int:
    """How many rows, or answers of rewards, one process computes at a time.

    Raises `UserError` if those of a batch cannot be divided evenly.
    """
    processes, pieces = int(os.environ.get("WORLD_SIZE", "1")), recipe.gradient_accumulation
    answers = recipe.num_generations or 1
    rows, rest = divmod(recipe.batch_size * answers, processes * pieces)
    if rest:
        raise UserError(
            f"batch_size {recipe.batch_size}"
            + (f" with {answers} answers to each prompt" if recipe.num_generations else "")
            + f" cannot be shared by {processes} processes"
            + (f" in {pieces} pieces each" if pieces > 1 else "")
        )
    return rows


def arguments(recipe: Recipe, folder: Path, task: Task, cls: type, extra: dict[str, Any]) -> TrainingArguments:
    """The recipe as arguments of the class `cls`, transformers' TrainingArguments or TRL's. `extra`: arguments of this
    class alone."""
    known = {field.name for field in fields(cls)}
    kind = choose_precision(recipe.precision, recipe.base.dtype)
    rows = rows_at_once(recipe)
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    extra[checkpointing] = recipe.gradient_checkpointing  # TRL's default is True
    if recipe.gradient_checkpointing:
        extra[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    chosen = dict(
        output_dir=str(folder / CHECKPOINTS),
        run_name=folder.name,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=max(rows, EVALUATION_ROWS),
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=recipe.schedule,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        use_cpu=training_device().type == "cpu",
        seed=recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,  # the latest; the best is kept beside it
        load_best_model_at_end=True,
        metric_for_best_model=task.metric,
        greater_is_better=task.greater_is_better,
        restore_callback_states_from_checkpoint=True,
        logging_steps=0.01,  # of all steps
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        report_to=[name for name in recipe.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,  # callbacks.ProgressBar
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        **{"warmup_ratio" if recipe.warmup < 1 and "warmup_ratio" in known else "warmup_steps": recipe.warmup},
        **extra,
    )
    if ours := chosen.keys() & recipe.trainer_options.keys():
        raise UserError(f"trainer_options: {min(ours)} is decided by the recipe's other fields: leave it out")
    args = cls(**chosen, **recipe.trainer_options)
    args._n_gpu = min(1, args.n_gpu)  # several GPUs by torchrun or accelerate, never by DataParallel
    return args


def as_batch(trainer: Any, rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Training rows as the model gets them, on its device."""
    chosen = trainer._remove_unused_columns(trainer.train_dataset).select(rows)
    batch = trainer.data_collator(list(chosen))
    if isinstance(batch, list):  # rewards: TRL itself makes tokens of the prompts
        batch = pad_prompts(trainer.processing_class, [row["input_ids"] for row in batch], "left")
    return {key: value.to(trainer.model.device) for key, value in batch.items() if torch.is_tensor(value)}


# --- training -------------------------------------------------------------------------------------------------------


class EpochOrder(Sampler[int]):
    """The order of the rows in an epoch. It depends on seed and epoch alone, so that any epoch can be resumed.

    With `lengths`, batches are made of rows of similar length, in random order. An incomplete batch comes last.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: list[int] | None = None) -> None:
        self.rows, self.batch_size, self.seed, self.lengths = rows, batch_size, seed, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.rows)
        if self.lengths is not None:
            whole = self.rows - self.rows % self.batch_size
            span = self.batch_size * min(MEGABATCH, max(1, whole // (4 * self.batch_size)))
            lengths = np.asarray(self.lengths)
            spans = [order[start : min(start + span, whole)] for start in range(0, whole, span)]
            grouped = [part[np.argsort(-lengths[part], kind="stable")] for part in spans]
            batches = np.concatenate([*grouped, order[:0]]).reshape(-1, self.batch_size)
            order = np.concatenate([random.permutation(batches).reshape(-1), order[whole:]])
        return iter(order.tolist())


class RunTrainer(Mixin):
    """What a run adds to `Trainer` or one of TRL's: `class _(RunTrainer, Trainer)`.

    `order` gives the rows; the parameters `head` learn at `head_lr`. A loss that is not finite raises `RunError`
    before it reaches the weights. Set `terminated` to stop: then `should_stop` is true on every process after the same
    step or checkpoint.
    """

    order: EpochOrder | AnswerOrder
    head: Iterable[torch.nn.Parameter] = ()
    head_lr: float | None = None
    terminated = False
    should_stop = False

    def _get_train_sampler(self, *_: Any) -> EpochOrder | AnswerOrder:
        return self.order

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        bad, self.should_stop = self.on_any_process(not math.isfinite(loss.item()), self.terminated)
        if bad:
            raise RunError(
                f"the loss is not finite at step {self.state.global_step + 1}: try a lower learning_rate or "
                f"precision: fp32; {_kept(str(self.args.output_dir))}"
            )
        return loss

    def on_any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is true on some process. All processes leave the loop together, or some would wait for the
        others."""
        if self.args.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.float32, device=self.args.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return [flag > 0 for flag in found.tolist()]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.head_lr is not None:
            _split_head(optimizer, {id(parameter) for parameter in self.head}, self.head_lr)
        return optimizer


def _split_head(optimizer: torch.optim.Optimizer, head: set[int], rate: float) -> None:
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in head]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            optimizer.add_param_group({**group, "params": chosen, "lr": rate})


def _kept(checkpoints: str) -> str:
    last = last_checkpoint(Path(checkpoints))
    return f"kept: {last}" if last else "there is no checkpoint yet"


# --- generating and scoring -----------------------------------------------------------------------------------------


class GeneratingTrainer(Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer, for decoders too, with the task's arguments of `generate` in `generation`.

    If the task computes no metrics, `evaluate` gives the loss alone, and only `predict` generates: for rows without
    labels, which are padded on the left if the model is a decoder.
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
        # The default counts rows twice that only fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = vars(self.model.generation_config)
        before = dict(config)
        with self.accelerator.autocast():  # `generate` does not use the forward that accelerate wraps
            loss, tokens, labels = super().prediction_step(model, inputs, *args, **kwargs)
        config.update(before)  # Seq2SeqTrainer changes it, and the next `generate` would warn
        if tokens is not None and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :].contiguous()
        return loss, tokens, labels


def new_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, asked: int, prompt: int) -> int:
    """How many tokens to generate: `asked`, or fewer if the model has no positions for so many after a prompt of
    `prompt` tokens."""
    if model.config.is_encoder_decoder:
        limit = positions(model, decoder=True)
        return asked if limit is None else min(asked, limit.tokens)
    return min(asked, input_limit(model, tokenizer).tokens - prompt)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> list[str]:
    """Texts of token ids of shape (rows, length), padded with `IGNORED`."""
    padded = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
    return tokenizer.batch_decode(padded, skip_special_tokens=True)


def as_scored(task: Task, tokenizer: PreTrainedTokenizerBase, prediction: Any) -> EvalPrediction:
    """A Trainer's prediction in the form that the task scores: logits and labels, or texts if the task generates."""
    found = EvalPrediction(prediction.predictions, prediction.label_ids)
    return found if task.generation is None else EvalPrediction(*(decode_tokens(tokenizer, each) for each in found))


def metrics_function(
    task: Task, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """What the Trainer calls after an evaluation: the task's `compute_metrics`, which gets texts if the task
    generates."""
    compute = task.compute_metrics
    return compute and (lambda prediction: compute(as_scored(task, tokenizer, prediction)))


def answer_scores(trainer: Any, task: Task, dataset: Dataset, max_length: int) -> dict[str, float | None]:
    """The scores of the answers to a data set's questions, for a task that has such scores; {} for others.

    All processes generate, and the main process scores.
    """
    if task.score_answers is None:
        return {}
    texts = answer_questions(trainer, task, dataset, max_length)
    return task.score_answers(texts, dataset) if trainer.is_world_process_zero() else {}


def answer_questions(trainer: Any, task: Task, dataset: Dataset, max_length: int) -> list[str]:
    """The generated answers to a data set's questions."""
    tokenizer = trainer.processing_class
    questions = encode_questions(task, task.questions(dataset), trainer.model, tokenizer, max_length)
    return decode_tokens(tokenizer, trainer.predict(questions.rows).predictions)

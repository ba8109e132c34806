"""Completions for TRL's GRPOTrainer, sampled by vLLM with the edit that is in training.

TRL's own way to vLLM merges the adapter and sends all of the model's parameters after each step, and vLLM drops the
biases that merging gives to layers without one. Here the engine keeps the base model as it is, and each generation
begins by writing the edit, some 100 KB, into the plug-in's tables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from redpeft.adapters import Adapter, EffectiveEdit
from redpeft.errors import UserError, shorten_list
from redpeft.models import keep_modes_and_rng
from redpeft.serving.plugin import check_version
from redpeft.serving.served_base import engine_folder
from redpeft.tuner import RedModel
from redpeft.tuner.heads import head_of
from redpeft.tuner.layer import edits_of

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from redpeft.serving.vllm_internals.local_engine import LocalEngine

IN_TRAINING = Path("the adapter in training")  # in place of a folder, in the messages of refusals


class Rollouts:
    """A `rollout_func` for a GRPOTrainer with `use_vllm=False`, whose model is a `PeftModel` with one RED adapter.

    `base` is the folder of the trainer's base model. The engine loads it a second time, at the first call, in this
    process and with the trainer's settings: those of sampling, `vllm_gpu_memory_utilization`, `vllm_max_model_length`
    and `vllm_importance_sampling_correction`. `options` are further arguments of vLLM's `LLM`.

    Raises `UserError`: vLLM is not installed or of another version; `base` is a GGUF file; and at the first call an
    edit that the engine cannot apply, a head, several adapters, several processes.
    """

    def __init__(self, base: str | Path, **options: Any) -> None:
        check_version()
        self.base, self.options = engine_folder(base), options
        self.engine: LocalEngine | None = None
        # Read when vLLM is imported, which importing TRL's trainer does. A command's own output goes to stdout.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list]:
        """One completion for each prompt (TRL repeats a prompt for each of its generations): `prompt_ids` and
        `completion_ids`, and the tokens' `logprobs` as they were sampled."""
        adapter = adapter_in_training(trainer.model)
        if self.engine is None:
            self.engine = self._start(trainer, adapter)
        args = trainer.args
        sampling = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            "stop_token_ids": trainer.eos_token_ids,
            **(args.generation_kwargs or {}),
        }
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        completions = self.engine.complete(prompt_ids, adapter, sampling)
        # From now on TRL corrects for the difference between the engine's probabilities and its own, as it does with
        # `use_vllm=True`.
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self, trainer.state.global_step
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [each.tokens for each in completions],
            "logprobs": [each.logprobs for each in completions],
        }

    def sync_weights(self) -> None:
        """TRL calls it before `__call__`, which takes the edit itself."""

    def _start(self, trainer: GRPOTrainer, adapter: Adapter) -> LocalEngine:
        if trainer.accelerator.num_processes > 1:
            raise UserError("rollouts with vLLM run in one process: train in one, or without use_vllm")
        from redpeft.serving.vllm_internals.local_engine import LocalEngine

        args = trainer.args
        options = {
            "dtype": trainer.model.dtype,
            "max_model_len": args.vllm_max_model_length,
            "max_num_seqs": args.generation_batch_size,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        }
        try:
            with keep_modes_and_rng(trainer.model):
                return LocalEngine(self.base, list(adapter.edits), **options | self.options)
        except UserError as error:
            raise UserError(f"{IN_TRAINING} cannot be used for rollouts with vLLM: {error}") from None


def adapter_in_training(model: PeftModel) -> Adapter:
    """The active adapter of a model as it is now. `UserError`: not RED's, several, or with a head."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, RedModel):
        raise UserError("rollouts with vLLM are for RED adapters: for others use TRL's own (use_vllm=True)")
    name, *others = model.active_adapters
    if others:
        raise UserError(f"rollouts with vLLM are for one adapter, and {shorten_list([name, *others])} are active")
    if head := head_of(model.base_model.model, name):
        names = shorten_list(list(head))
        raise UserError(f"{IN_TRAINING} has a head ({names}), which vLLM cannot use: train without use_vllm")
    edits = {
        site: EffectiveEdit(*(vector.detach() for vector in edit.effective))
        for site, edit in edits_of(model.base_model.model, name).items()
    }
    return Adapter(IN_TRAINING, model.peft_config[name].to_dict(), edits, units={}, head={})

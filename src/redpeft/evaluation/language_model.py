"""A language model that answers: a model folder, a run, or a base model with an adapter.

Decoding is the paper's, greedy. A batch gives every question the answer that it would get alone: prompts are padded on
the left, and the penalties see no padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from redpeft.adapters.folder import load_adapter, read_config
from redpeft.console import bars_on_terminals_only
from redpeft.errors import UserError, first_line
from redpeft.models import (
    DTYPE_ARGUMENT,
    adapter_tokenizer,
    autocast,
    choose_precision,
    end_tokens,
    find_base,
    input_limit,
    load_decoder,
    load_tokenizer,
    pad_prompts,
    quiet,
)
from redpeft.storage import CONFIG_NAME, RECIPE, TASK, WEIGHTS_NAME, find_adapter, find_run, read_json
from redpeft.tasks.base import task_from_dict
from redpeft.tasks.instruction import Chat, InstructionTask
from redpeft.training.predict import open_run

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Every setting is given, since a model folder's generation_config.json may have others."""


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding with these limits and penalties. The defaults are the paper's.

    Attributes:
        max_new_tokens: the longest answer.
        repetition_penalty: the penalty on tokens that occurred already, in the prompt too; 1: none.
        no_repeat_ngrams: no sequence of this many tokens occurs twice in prompt and answer together; 0: no limit.
    """

    max_new_tokens: int = 768
    repetition_penalty: float = 1.1
    no_repeat_ngrams: int = 5


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer, how a chat becomes its prompt, and the context in which it computes."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    task: InstructionTask = field(default_factory=lambda: InstructionTask({"messages": "messages"}))
    context: Callable[[], AbstractContextManager] = nullcontext

    def prompt(self, chat: Chat, decoding: Decoding) -> list[int]:
        """The tokens that the next answer of a chat continues.

        Raises `UserError` where the chat template refuses the chat, or there is no room for the answer.
        """
        [prompt] = self.task.prompt_tokens([chat], self.tokenizer)
        limit = input_limit(self.model, self.tokenizer)
        if len(prompt) + decoding.max_new_tokens > limit.tokens:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {decoding.max_new_tokens} new ones are more than "
                f"{limit.source}: {'lower --max-new-tokens' if len(prompt) < limit.tokens else 'shorten it'}"
            )
        return prompt

    def answer(self, chats: Sequence[Chat], decoding: Decoding, adapters: Sequence[str] | None = None) -> list[str]:
        """The next answer of each chat, made together as one batch, without spaces around it.

        `adapters`: the name of the adapter that answers each chat, `tuner.mixed.BASE` for none of them; default: the
        active one answers all. Raises as `prompt`, and `UserError` for an unknown name.
        """
        prompts = [self.prompt(chat, decoding) for chat in chats]
        inputs = pad_prompts(self.tokenizer, prompts, "left").to(self.model.device)
        padding = (inputs["attention_mask"] == 0).sum(1).tolist()
        with torch.inference_mode(), self.context(), quiet():
            tokens = self.model.generate(
                **inputs,
                **({} if adapters is None else {"adapter_names": list(adapters)}),
                **GREEDY,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                max_new_tokens=decoding.max_new_tokens,
                logits_processor=LogitsProcessorList([WithoutPadding(penalties(decoding), padding)]),
                eos_token_id=end_tokens(self.model, self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        texts = self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


class WithoutPadding(LogitsProcessor):
    """Applies other processors to each row without its padding on the left, which they would count as seen tokens.

    `padding` is the number of such tokens in each row. input_ids (batch, length), scores (batch, vocabulary).
    """

    def __init__(self, processors: LogitsProcessorList, padding: list[int]) -> None:
        self.processors, self.padding = processors, padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = enumerate(self.padding)
        return torch.cat([self.processors(input_ids[i : i + 1, left:], scores[i : i + 1]) for i, left in rows])


def penalties(decoding: Decoding) -> LogitsProcessorList:
    """transformers' processors for what `decoding` forbids or holds back."""
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.no_repeat_ngrams:
        processors.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngrams))
    return processors


def open_language_model(name: str, adapter: str | Path | None = None) -> LanguageModel:
    """The model that `name` means, on the GPU where there is one: a run folder, an adapter folder, a model folder or
    a hub name, with `adapter` on it, if given.

    A run, and an adapter that lies in a run folder, answer as they were trained: their prompts, tokenizer and number
    format. Elsewhere prompts go by the adapter's chat template, the tokenizer's, or the plain template where there
    is none.

    Raises `UserError` for what cannot be loaded, a run of another task, and an adapter of another base model.
    """
    run_folder = find_run(adapter or name)
    if (run_folder / RECIPE).is_file() or any(run_folder.glob(f"seed-*/{RECIPE}")):
        run = open_run(run_folder, base=name if adapter else None)
        task = _as_chat(run.task, run_folder)
        precision = choose_precision(run.recipe.precision, run.recipe.base.dtype)
        return LanguageModel(run.model, run.tokenizer, task, lambda: autocast(precision, run.model.device))
    if adapter is None and (Path(name) / CONFIG_NAME).is_file():
        adapter, name = name, read_config(name).get("base_model_name_or_path") or ""
        if not name:
            raise UserError(f"{adapter} does not name its base model: give the base as MODEL, and this with --adapter")
    model, tokenizer = load_language_model(name)
    if adapter is None:
        return LanguageModel(model, tokenizer)
    task, tokenizer = prompt_form(adapter, tokenizer)
    return LanguageModel(attach(model, adapter), tokenizer, task)


def prompt_form(
    adapter: str | Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[InstructionTask, PreTrainedTokenizerBase]:
    """How a chat becomes the prompt of an adapter, as it was trained: by its run's template, with the tokenizer that
    was saved with it, or else the base's `tokenizer`. Raises `UserError` for a run of another task."""
    folder, run = find_adapter(adapter), find_run(adapter)
    tokenizer = adapter_tokenizer(folder, tokenizer)
    if (run / TASK).is_file():
        return _as_chat(task_from_dict(read_json(run / TASK)), run), tokenizer
    return InstructionTask({"messages": "messages"}), tokenizer


def _as_chat(task: Any, run: Path) -> InstructionTask:
    """The task of a run for chats, whatever the columns of its data were."""
    if not isinstance(task, InstructionTask):  # preferences are one: their runs answer chats as well
        raise UserError(f"the run in {run} was trained for {task.name}; answers need a run of the task instruction")
    return InstructionTask({"messages": "messages"}, template=task.template)


def load_language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plain language model in evaluation mode and its tokenizer: on a GPU in the checkpoint's number format,
    otherwise in fp32. UserError as `models.load_pretrained`."""
    bars_on_terminals_only()
    find_base(name)
    cuda = torch.cuda.is_available()
    with quiet():
        tokenizer = load_tokenizer(name)
        model = load_decoder(name, tokenizer, **{DTYPE_ARGUMENT: "auto" if cuda else torch.float32})
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def attach(base: PreTrainedModel | PeftModel, adapter: str | Path, name: str = "default") -> PeftModel:
    """`base` with an adapter of any PEFT type on it, in evaluation mode; `detach` gives the base model back. `base`
    may have adapters of the same type already, under other names.

    Raises `UserError` for a folder that holds none, and for one that does not fit this base model.
    """
    folder = find_adapter(adapter)
    if read_config(folder)["peft_type"] == "REDPEFT":
        return load_adapter(base, folder, adapter_name=name).eval()
    try:
        if isinstance(base, PeftModel):
            base.load_adapter(str(folder), name)
            return base.eval()
        return PeftModel.from_pretrained(base, str(folder), name).eval()
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:  # PEFT's, of many kinds
        raise UserError(f"{folder}: PEFT cannot load this adapter onto the base model: {first_line(error)}") from error


def detach(model: PeftModel) -> PreTrainedModel:
    """The base model as it was before `attach`."""
    tuner = model.base_model
    return tuner.unload() if isinstance(tuner, BaseTuner) else tuner  # prompts and prefixes leave it as it is


def weights_digest(adapter: str | Path | None) -> str | None:
    """A digest of an adapter's weights, by which unfinished work notices a retrained adapter; None without one."""
    weights = find_adapter(adapter) / WEIGHTS_NAME if adapter is not None else None
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights and weights.is_file() else None

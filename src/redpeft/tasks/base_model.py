"""Loading a base model and its tokenizer for a task, and how long a row they read; errors in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, PeftType
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from redpeft.adapters.loading import ensure_pad_token
from redpeft.errors import UserError, first_line
from redpeft.tasks.columns import CUT
from redpeft.tasks.data import is_local

KINDS = {
    "AutoModelForCausalLM": "the task needs a decoder, such as Llama or GPT-2",
    "AutoModelForSeq2SeqLM": "the task needs an encoder-decoder, such as T5 or BART",
}
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # what configurations call it
RELATIVE = ("relative_attention_num_buckets", "relative_attention", "alibi")  # of models that need no such number


def load_base(auto_class: Any, base: str | Path, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(base, **kwargs)`: a model, tokenizer or config of a local folder or a hub name.

    Raises:
        UserError: no such folder or hub name, broken files, or an architecture that has no class of this kind.
    """
    folder = require_folder(base)
    try:
        return auto_class.from_pretrained(str(folder), **kwargs)
    except Exception as error:  # of transformers, tokenizers, safetensors, the hub's client: of every kind
        place = "" if folder.is_dir() else ", a name on the Hugging Face hub since there is no such folder,"
        reason, kind = first_line(error), getattr(auto_class, "__name__", "")
        if reason.endswith(":"):
            reason = " ".join(str(error).split())
        if reason.startswith("Unrecognized configuration class"):
            reason = f"transformers has no such class for this architecture; {KINDS.get(kind, 'choose another task')}"
        raise UserError(f"cannot load {base}{place} with {kind}: {reason}") from error


def load_tokenizer(base: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. UserError as `load_base`, and for a folder without a vocabulary, of which transformers
    makes a tokenizer that knows no words."""
    tokenizer = load_base(AutoTokenizer, base, **kwargs)
    if len(tokenizer) - len(tokenizer.all_special_ids) < 2:
        raise UserError(
            f"the tokenizer of {base} has no vocabulary: its files (tokenizer.json, vocab.txt, ...) belong beside the "
            "model's"
        )
    return tokenizer


def load_decoder(base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    """The base model as a language model that writes; without a pad token it gets the tokenizer's.

    Raises:
        UserError: as `load_base`, and for an encoder such as BERT, which sees the words that it is to write.
    """
    model = load_base(AutoModelForCausalLM, base, **kwargs)
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not model.config.is_decoder:
        raise UserError(
            f"{base} is an encoder ({type(model).__name__}), which reads a text and cannot write one: "
            f"{KINDS['AutoModelForCausalLM']}"
        )
    set_pad_token(model, tokenizer)
    return model


def require_folder(base: str | Path) -> Path:
    """The folder that `base` means if it is no hub name. UserError where it must be a folder and there is none."""
    folder = Path(base).expanduser()
    if is_local(str(base)) and not folder.is_dir():
        raise UserError(f"no such model folder: {base}")
    return folder


# --- padding --------------------------------------------------------------------------------------------------------


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells the model which token pads, where it does not know: decoders find their last real token by it."""
    ensure_pad_token(tokenizer)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def pad_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], side: str) -> BatchEncoding:
    """Prompts as tensors for `generate`: padded on the left for a decoder, which goes on at their ends, on the right
    for an encoder."""
    ensure_pad_token(tokenizer)
    rows = BatchEncoding({"input_ids": prompts})
    return tokenizer.pad(rows, padding_side=side, return_tensors="pt", verbose=False)


# --- rows in tokens -------------------------------------------------------------------------------------------------


def tokens_of(tokenizer: PreTrainedTokenizerBase, *texts: list, limit: int | None, **options: Any) -> BatchEncoding:
    """What the tokenizer makes of a batch of texts, or pairs of texts, each cut at `limit` tokens; the column `CUT`
    says which were longer.

    Raises:
        UserError: `limit` leaves no room for a text.
    """
    if limit is None:
        encoded = tokenizer(*texts, verbose=False, **options)
        encoded[CUT] = [False] * len(texts[0])
        return encoded
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    if limit < special + len(texts):  # of which tokenizers take no notice
        raise UserError(f"{limit} tokens leave no room for a text beside {special} special ones: raise max_length")
    encoded = tokenizer(*texts, truncation=True, max_length=limit, **options)
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= limit]
    cut = [False] * len(texts[0])
    if full:
        whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False, **options)
        for row, ids in zip(full, whole["input_ids"], strict=True):
            cut[row] = len(ids) > limit
    encoded[CUT] = cut
    return encoded


# --- how long a row may be ------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """The longest row in tokens, and what sets it, such as "max_length 256"."""

    tokens: int
    source: str


def input_limit(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Limit:
    """The longest row that the model reads: the least of `max_length`, the tokenizer's limit, and its positions.

    Raises:
        UserError: virtual tokens leave no position to a row.
    """
    limits = [Limit(tokenizer.model_max_length, f"the tokenizer's model_max_length {tokenizer.model_max_length}")]
    if max_length is not None:
        limits.insert(0, Limit(max_length, f"max_length {max_length}"))
    if (own := positions(model)) is not None:
        limits.append(own)
    return min(limits, key=lambda limit: limit.tokens)


def known_tokens(model: Any) -> int | None:
    """How many tokens have an embedding; None for a model such as CANINE, which reads characters by their digests."""
    try:
        return len(model.get_input_embeddings().weight)
    except NotImplementedError:
        return None


def positions(model: Any, decoder: bool = False) -> Limit | None:
    """How many tokens of a row have a position in the model, as its configuration and its table of positions say;
    None where positions are relative. Virtual tokens of prompts and prefixes take some of them.

    Of a model that reads with an encoder and writes with a decoder it is the encoder, or with `decoder` the decoder.

    Raises:
        UserError: virtual tokens leave no position to a row.
    """
    base = part = model.get_base_model() if isinstance(model, PeftModel) else model
    writes_apart = base.config.is_encoder_decoder and base.can_generate()
    if writes_apart:
        part = base.get_decoder() if decoder else base.get_encoder()
    config = part.config.get_text_config()
    found = _tables(part, {type(part.config), type(config)})
    if not any(getattr(config, name, None) for name in RELATIVE):
        found += [getattr(config, name, None) or 0 for name in LENGTHS]
    count = min((number for number in found if number > 0), default=None)
    if count is None:
        return None
    virtual = _virtual_tokens(model) if not writes_apart or decoder == _is_prefix(model) else 0
    if virtual >= count:
        raise UserError(
            f"{virtual} virtual tokens do not fit into the {count} positions of {type(base).__name__}: lower "
            "method_options.num_virtual_tokens"
        )
    behind = f" behind {virtual} virtual tokens" if virtual else ""
    return Limit(count - virtual, f"the {count} positions of {type(base).__name__}{behind}")


def _tables(part: Any, kinds: set[type]) -> list[int]:
    """The rows of a model's learned positions, without those that no token gets; `kinds` are the configurations of its
    text part: pictures have positions of their own."""
    sizes, owners = [], {"": part.config}
    for name, module in part.named_modules():
        parent, _, last = name.rpartition(".")
        config = getattr(module, "config", None)
        owners[name] = config if isinstance(config, PretrainedConfig) else owners[parent]
        weight = getattr(module, "weight", None)
        if not re.search(r"^(?!.*rel).*(position|wpe)", last) or weight is None or weight.dim() != 2:
            continue
        if type(owners[name]) in kinds:
            padding = getattr(module, "padding_idx", None)  # RoBERTa counts from behind it, OPT and BART by an offset
            unused = getattr(module, "offset", 0) if padding is None else padding + 1
            sizes.append(len(weight) - unused)
    return sizes


def _virtual_tokens(model: Any) -> int:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return getattr(config, "num_virtual_tokens", None) or 0


def _is_prefix(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING

"""What goes into a model: tokens and padding, how long a row may be, random inputs."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from redpeft.errors import UserError

# --- tokenizers and padding -----------------------------------------------------------------------------------------


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest that differs between tokenizers that make different tokens of a text or a chat. Using a tokenizer does
    not change it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items())
    else:
        backend.no_truncation(), backend.no_padding()  # they are left from the last call
        words = backend.to_str()
    limits = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
    parts = (type(tokenizer).__name__, words, tokenizer.special_tokens_map, tokenizer.chat_template, limits)
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token another of its tokens as one. Padding is masked, so any token would do.

    The end token is taken first, or else a token that no text ends with: classifiers on a decoder look for the last
    token that is not padding.
    """
    if tokenizer.pad_token is None:
        special = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token, tokenizer.cls_token)
        named = [token for token in (*special, tokenizer.unk_token) if token is not None]
        tokenizer.pad_token = named[0] if named else tokenizer.convert_ids_to_tokens(0)


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model its pad token, if it has none: a decoder finds the last real token of a row by it."""
    ensure_pad_token(tokenizer)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def pad_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], side: str) -> BatchEncoding:
    """Prompts as tensors for `generate`: padded on the left for a decoder, which continues at their ends, and on the
    right for an encoder."""
    ensure_pad_token(tokenizer)
    rows = BatchEncoding({"input_ids": prompts})
    return tokenizer.pad(rows, padding_side=side, return_tensors="pt", verbose=False)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's, and the tokenizer's, which the plain template puts behind each."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})


# --- how long a row may be ------------------------------------------------------------------------------------------

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # names in configurations
RELATIVE_POSITIONS = ("relative_attention_num_buckets", "relative_attention", "alibi")  # of models without a limit


class Limit(NamedTuple):
    """The length of the longest row in tokens, and what sets it, such as "max_length 256"."""

    tokens: int
    source: str


def input_limit(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Limit:
    """The longest row that the model can read: the smallest of `max_length`, the tokenizer's limit and the model's
    positions.

    Raises:
        UserError: virtual tokens leave no position for a row.
    """
    limits = [Limit(tokenizer.model_max_length, f"the tokenizer's model_max_length {tokenizer.model_max_length}")]
    if max_length is not None:
        limits.insert(0, Limit(max_length, f"max_length {max_length}"))
    if (own := positions(model)) is not None:
        limits.append(own)
    return min(limits, key=lambda limit: limit.tokens)


def known_tokens(model: Any) -> int | None:
    """How many tokens have an embedding. None for a model such as CANINE, which hashes characters."""
    try:
        return len(model.get_input_embeddings().weight)
    except NotImplementedError:
        return None


def positions(model: Any, decoder: bool = False) -> Limit | None:
    """How many tokens of a row have a position in the model, by its configuration and its table of positions. None if
    positions are relative. The virtual tokens of prompts and prefixes take some of them.

    For an encoder-decoder these are the encoder's positions, or with `decoder` the decoder's.

    Raises:
        UserError: virtual tokens leave no position for a row.
    """
    from peft import PeftModel  # not at the top: importing PEFT imports the tuner, which needs this module

    adapter: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    base = part = model.get_base_model() if isinstance(model, PeftModel) else model
    writes_apart = base.config.is_encoder_decoder and base.can_generate()
    if writes_apart:
        part = base.get_decoder() if decoder else base.get_encoder()
    config = part.config.get_text_config()
    found = _tables(part, {type(part.config), type(config)})
    if not any(getattr(config, name, None) for name in RELATIVE_POSITIONS):
        found += [getattr(config, name, None) or 0 for name in LENGTHS]
    count = min((number for number in found if number > 0), default=None)
    if count is None:
        return None
    virtual = getattr(adapter, "num_virtual_tokens", None) or 0
    if writes_apart and decoder != (virtual > 0 and adapter.peft_type == "PREFIX_TUNING"):
        virtual = 0  # prompts go into the encoder, prefixes into the decoder
    if virtual >= count:
        raise UserError(
            f"{virtual} virtual tokens do not fit into the {count} positions of {type(base).__name__}: lower "
            "method_options.num_virtual_tokens"
        )
    behind = f" behind {virtual} virtual tokens" if virtual else ""
    return Limit(count - virtual, f"the {count} positions of {type(base).__name__}{behind}")


def _tables(part: Any, kinds: set[type]) -> list[int]:
    """The sizes of a model's tables of learned positions, without rows that no token uses. `kinds`: the configurations
    of its text part, since images have positions of their own."""
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


# --- random inputs --------------------------------------------------------------------------------------------------

ROWS, POSITIONS = 8, 64  # of random tokens


def example_inputs(model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """Random inputs for a transformers model, the same at every call, from its `main_input_name` and configuration.

    Token ids (8, 64), noise for images and audio, and decoder ids for an encoder-decoder. Raises `UserError` for a
    model that takes anything else.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise UserError("it is not a model of transformers")
    inputs: dict[str, Any] = {name: _random_input(name, config)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _random_input("input_ids", config)[: len(inputs[name])]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _random_input(name: str, config: Any) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        positions = min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)
        positions = max(1, positions - 2)  # RoBERTa-like models keep two positions for padding
        ids = torch.randint(0, text.vocab_size, (ROWS, positions), generator=generator)
        special = torch.tensor(sorted(_special_tokens(config) | _special_tokens(text)))
        plain = next((token for token in range(text.vocab_size) if token not in special), 0)
        return ids.masked_fill(torch.isin(ids, special), plain)
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, generator=generator)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return torch.randn(2, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if name == "input_values":
        return torch.randn(2, 16000, generator=generator)
    raise UserError(f"it takes {name}")


def _special_tokens(config: Any) -> set[int]:
    """Padding, ends of texts, and the tokens that stand for images, which a model counts."""
    values = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    tokens = [token for value in values for token in (value if isinstance(value, list) else [value])]
    return {token for token in tokens if isinstance(token, int)}

"""Loading a base model for a task, with errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redpeft.errors import UserError, first_line
from redpeft.tasks.data import is_local


def load_base(auto_class: Any, base: str | Path, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(base, **kwargs)`: a model, tokenizer or config of a local folder or a hub name.

    Raises:
        UserError: no such folder or hub name, broken files, or an architecture that has no class of this kind.
    """
    folder = require_folder(base)
    try:
        return auto_class.from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        place = "" if folder.is_dir() else ", a name on the Hugging Face hub since there is no such folder,"
        raise UserError(f"cannot load {base}{place} with {auto_class.__name__}: {first_line(error)}") from error


def require_folder(base: str | Path) -> Path:
    """The folder that `base` means if it is no hub name. UserError where it must be a folder and there is none."""
    folder = Path(base).expanduser()
    if is_local(str(base)) and not folder.is_dir():
        raise UserError(f"no such model folder: {base}")
    return folder


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a decoder's tokenizer without a pad token its end token; padding is masked, so any token would do."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells the model which token pads, where it does not know: decoders find their last real token by it."""
    ensure_pad_token(tokenizer)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def token_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """The length to cut at: `max_length`, or what the model reads if that is less."""
    return min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)

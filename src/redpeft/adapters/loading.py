"""Models without their weights, and transformers' words for loading them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# as from_pretrained and configurations call it
DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


def on_meta(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights. `model_class`: an auto class, or a model's own."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        return build(copy.deepcopy(config))


def checkpoint_class(config: PretrainedConfig) -> Any:
    """The class of model that a checkpoint with this configuration holds, or else the auto class of bare models."""
    return getattr(transformers, (config.architectures or [""])[0], None) or AutoModel


def loading_report(model: PreTrainedModel, checkpoint: str | Path, **options: Any) -> dict[str, Any]:
    """transformers' report of loading `checkpoint` into a model of this class and configuration, by the tensors' names
    and shapes alone: `missing_keys`, `unexpected_keys` and `mismatched_keys`. `options` go to `from_pretrained`."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    loader: Any = type(model)
    with quiet():
        _, info = loader.from_pretrained(
            str(checkpoint),
            config=config,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return info


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer without a pad token another of its tokens: padding is masked, so any one would do.

    Its end, or what else stands in no text's last place, where classifiers with a decoder look for the last token
    that does not pad.
    """
    if tokenizer.pad_token is None:
        special = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token, tokenizer.cls_token)
        named = [token for token in (*special, tokenizer.unk_token) if token is not None]
        tokenizer.pad_token = named[0] if named else tokenizer.convert_ids_to_tokens(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' words and bars on what it loads."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

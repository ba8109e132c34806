"""Loading base models, whole or without weights, and the weights that a checkpoint does not have."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CHAT_TEMPLATE_FILE

from redpeft.console import log_main
from redpeft.errors import UserError, first_line, shorten_list
from redpeft.models.base_files import (
    GGUF,
    LLAMA_BIASES,
    check_gguf_weights,
    complete_gguf_config,
    find_base,
    parse_gguf,
    read_gguf_header,
    reading_gguf,
)
from redpeft.models.formats import DTYPE_ARGUMENT, DTYPES, dtype_name, quantised_weights
from redpeft.models.inputs import set_pad_token
from redpeft.storage import ADAPTER, CONFIG_NAME, new_folder, read_json

NEEDED = {
    "AutoModelForCausalLM": "the task needs a decoder, such as Llama or GPT-2",
    "AutoModelForSeq2SeqLM": "the task needs an encoder-decoder, such as T5 or BART",
}


def load_pretrained(auto_class: Any, base: str | Path, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(base, **kwargs)`: a model, tokenizer or config of whatever `find_base` finds.

    The weights of a GGUF file are dequantised, and the model is then like any other. Its configuration says what they
    were quantised as, in `dequantised_from`.

    Raises:
        UserError: no such base, broken files, or an architecture that has no class of this kind.
    """
    folder, gguf_file = find_base(base)
    kind = getattr(auto_class, "__name__", "")
    is_model = hasattr(auto_class, "from_config") or hasattr(auto_class, "_from_config")
    if header := read_gguf_header(base):
        if kind == "AutoTokenizer" and not header.has_tokenizer:
            raise UserError(f"{folder / str(gguf_file)} has no tokenizer in it: take a GGUF file that has one")
        kwargs["gguf_file"] = gguf_file
        if kind != "AutoTokenizer" and header.architecture == "llama":
            kwargs |= {
                switch: True for switch, place in LLAMA_BIASES.items() if any(place in name for name in header.biases)
            }
        if is_model:
            kwargs["output_loading_info"] = True
            if hasattr(transformers, "GgufConfig"):
                kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with reading_gguf() if header else nullcontext():
            loaded = auto_class.from_pretrained(str(folder), **kwargs)
    except Exception as error:  # errors of transformers, tokenizers, safetensors and the hub's client: of every kind
        place = "" if folder.is_dir() else ", a name on the Hugging Face hub since there is no such folder,"
        reason = (header is None and _not_a_model(folder, kind)) or _why_not_loaded(error, kind)
        raise UserError(f"cannot load {base}{place} with {kind}: {reason}") from error
    if header and is_model:
        parse_gguf.cache_clear()  # a large vocabulary takes 0.1 GB and more
        model, info = loaded
        model.gguf_loading_info = info
        check_gguf_weights(model, info, header, base)
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.remove_quantization_config(model)
        complete_gguf_config(model.config, header, base)
        model.name_or_path = str(base)  # what an adapter names as its base model
        log_main(f"{base}: dequantised from {header.quantised_as} to {dtype_name(model.dtype)}")
        return model
    if header and isinstance(loaded, PretrainedConfig):
        complete_gguf_config(loaded, header, base)
    elif header and kind == "AutoTokenizer":  # up to 5.17 transformers takes a Llama's first token for its last
        for name, number in header.special_tokens.items():
            setattr(loaded, name, loaded.convert_ids_to_tokens(number))
    return loaded


def _not_a_model(folder: Path, kind: str) -> str | None:
    """Why a local folder is not a base model's, by its configuration: there is none, or it is broken. None where the
    trouble is elsewhere. `kind`: the class that should load it; a tokenizer can do without a configuration."""
    config = folder / "config.json"
    if not folder.is_dir() or (kind == "AutoTokenizer" and (folder / "tokenizer_config.json").is_file()):
        return None
    if config.is_file():
        try:
            named = isinstance(read_json(config).get("model_type"), str)
        except (ValueError, AttributeError):
            return "its config.json is broken: copy it again"
        return None if named else "its config.json names no architecture (model_type)"
    if (folder / CONFIG_NAME).is_file() or (folder / ADAPTER / CONFIG_NAME).is_file():
        return "it holds an adapter and no model: give the adapter's base model, or fold the adapter into that first"
    if inside := [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]:
        return f"it holds no config.json, but {min(inside)} does: give that folder"
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if gguf := next((name for name in held if name.endswith(GGUF)), None):
        return f"it holds weights without a config.json: for the GGUF file in it give {folder / gguf}"
    content = f"only {shorten_list(held)}" if held else "and is empty"
    return f"it holds no model, neither a config.json nor a GGUF file, {content}: give another folder"


def _why_not_loaded(error: Exception, kind: str) -> str:
    """What an error of transformers says, in one line."""
    reason = first_line(error).strip()
    if "ignore_mismatched_sizes" in reason:  # the rest is a table that transformers has printed
        return "its weights have other shapes than its configuration says"
    if reason.startswith("Unrecognized configuration class"):
        return f"transformers has no such class for this architecture; {NEEDED.get(kind, 'choose another task')}"
    if unknown := re.search(r"model type `(.*)` but Transformers does not recognize", reason):
        return f"transformers {transformers.__version__} does not know the architecture {unknown[1]}: a newer one may"
    if reason.startswith("Error no file named"):
        return "its weights are missing: model.safetensors, or several files and model.safetensors.index.json"
    if reason.startswith("Couldn't instantiate the backend tokenizer"):
        return (
            "its tokenizer is missing: the files (tokenizer.json, vocab.txt, ...) belong beside the model's, and some "
            "kinds need the package sentencepiece or tiktoken"
        )
    return " ".join(str(error).split()) if reason.endswith(":") else reason


def load_config(base: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a base model, whose folder needs no weights. Raises `UserError` as `load_pretrained`."""
    return load_pretrained(AutoConfig, base, revision=revision)


def load_tokenizer(base: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises `UserError` as `load_pretrained`, and for a folder without a vocabulary, of which transformers makes a
    tokenizer that knows no words.
    """
    tokenizer = load_pretrained(AutoTokenizer, base, **kwargs)
    if len(tokenizer) - len(tokenizer.all_special_ids) < 2:
        raise UserError(
            f"the tokenizer of {base} has no vocabulary: its files (tokenizer.json, vocab.txt, ...) belong beside the "
            "model's"
        )
    return tokenizer


def adapter_tokenizer(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as an adapter uses it: the one in its folder, or the base's `tokenizer` with the folder's chat
    template. What the folder does not hold is the base's."""
    if (adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter)
    if (template := read_chat_template(adapter)) is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def read_chat_template(adapter: Path) -> str | None:
    """The chat template in an adapter's folder; None if it holds none, and the base model's is used."""
    file = adapter / CHAT_TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def load_decoder(base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    """The base model as a language model that writes text. If it has no pad token, it gets the tokenizer's.

    Raises:
        UserError: as `load_pretrained`, and for an encoder such as BERT, which cannot write text.
    """
    model = load_pretrained(AutoModelForCausalLM, base, **kwargs)
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not model.config.is_decoder:
        raise UserError(
            f"{base} is an encoder ({type(model).__name__}), which cannot generate text: "
            f"{NEEDED['AutoModelForCausalLM']}"
        )
    set_pad_token(model, tokenizer)
    return model


def load_classifier(
    auto_class: Any, base: str | Path, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], **kwargs: Any
) -> PreTrainedModel:
    """The base model with a head for these labels, which replaces the head of a base with other labels. A decoder
    without a pad token gets the tokenizer's. Raises `UserError` as `load_pretrained`."""
    model = load_pretrained(
        auto_class,
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    set_pad_token(model, tokenizer)
    return model


def export_base(base: str | Path, out: str | Path, dtype: str = "fp32") -> tuple[PreTrainedModel, str]:
    """Write a GGUF file as an ordinary model folder, with its tokenizer and chat template. `dtype`: of the dequantised
    weights, a key of `DTYPES`. Returns the model and what the file was quantised as.

    Raises:
        UserError: as `load_pretrained`; `base` has no GGUF file; `out` exists and is not an empty folder.
    """
    header = read_gguf_header(base)
    if header is None:
        ordinary = (Path(base) / "config.json").is_file()
        advice = "it can be used as it is" if ordinary else "give the file, or a folder with one"
        raise UserError(f"{base} is no GGUF file and holds none: {advice}")
    with quiet(), new_folder(Path(out)) as folder:
        tokenizer = load_tokenizer(base)
        model: PreTrainedModel = load_pretrained(
            checkpoint_class(load_config(base)), base, **{DTYPE_ARGUMENT: DTYPES[dtype]}
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, header.quantised_as


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


@contextmanager
def quiet() -> Iterator[None]:
    """While inside, transformers prints no messages and shows no progress bars."""
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


# --- models without weights -----------------------------------------------------------------------------------------


def on_meta(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights. `model_class`: an auto class, or a model's own."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        return build(copy.deepcopy(config))


def checkpoint_class(config: PretrainedConfig) -> Any:
    """The model class that a configuration names, or `AutoModel` if transformers does not have it."""
    return getattr(transformers, (config.architectures or [""])[0], None) or AutoModel


def empty_model(base: str | Path) -> PreTrainedModel:
    """A model without weights, on the meta device, from a configuration, of the class that its checkpoint holds if
    that is known."""
    config = load_config(base)
    return on_meta(checkpoint_class(config), config)


# --- new weights ----------------------------------------------------------------------------------------------------


def new_weights(model: PreTrainedModel, base: str | Path, revision: str | None = None) -> list[str]:
    """Names of the weights that the checkpoint of `base` lacks or has in another shape. Only names are read."""
    info = getattr(model, "gguf_loading_info", None)  # dequantising the file a second time takes long
    info = info or loading_report(model, find_base(base).folder, revision=revision)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    # a quantised checkpoint stores these weights in other shapes and under other names
    return sorted(new - quantised_weights(model))


@torch.no_grad()
def draw_weights(model: torch.nn.Module, weights: Iterable[str], seed: int) -> None:
    """Initialise these weights, given by their names in `model`, as transformers initialises weights that a checkpoint
    does not have.

    The same seed gives the same values, whatever was drawn before, whatever else the model holds, and on every device.
    """
    new = set(weights)
    if not new:
        return
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    owners = {name: model.get_submodule(name) for name in {weight.rpartition(".")[0] for weight in new}}
    devices = {name: next(owner.parameters()).device for name, owner in owners.items()}
    kept = {
        weight: parameter.clone()
        for name, owner in owners.items()
        for key, parameter in owner.named_parameters()
        if (weight := f"{name}.{key}") not in new
    }
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in owners
    for name, weight in model.named_parameters():
        weight._is_hf_initialized = name not in new
    for owner in owners.values():
        owner.to("cpu")  # a GPU would draw other numbers
    transformers.set_seed(seed)
    base.initialize_weights()
    for name, owner in owners.items():
        owner.to(devices[name])
    for name, weight in kept.items():  # transformers 4 initialises whole modules
        model.get_parameter(name).copy_(weight)

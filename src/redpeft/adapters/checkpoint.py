"""A base model's checkpoint on disk: its tensors, read one at a time, and which tensor is which of the model's.

Folding reads a base model here, and so does the check that an adapter belongs to it; neither loads the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from redpeft.errors import UserError, first_line
from redpeft.models import fingerprint_of
from redpeft.storage import escapes_root

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files to download besides the weights; the folders are those that sentence-transformers numbers.
NOT_WEIGHTS = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.spm", "*.codes", "*.bpe", "*.py"),
    *("LICENSE*", "NOTICE*", "[0-9]*_*/*"),
)
WEIGHT_FORMATS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".npz", ".pkl"),
    *(".tflite", ".mlmodel", ".index.json"),
)
REPLACED = ("config.json", "adapter_config.json", "README.md")  # a folded checkpoint has its own
LONG_ENDING = 3  # a name's last parts without a block's number, as in `mlp.down_proj.weight`


class Checkpoint:
    """The safetensors files of a model's folder. `files`: their names, each with the keys of its tensors; `name`: what
    messages call the folder, if not by its path.

    Raises `UserError` for a folder without such files (pickles are not read), and for missing or corrupt files.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or str(folder)
        self.files = self._files()
        self._file_of = {key: file for file, keys in self.files.items() for key in keys}

    @property
    def keys(self) -> Iterable[str]:
        return self._file_of.keys()

    def read(self, key: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with self.open(self._file_of[key]) as file:
            return file.get_tensor(key)

    def open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / file}: missing, corrupt or truncated ({error}); copy it again") from error

    def _shards(self) -> list[str]:
        try:
            return sorted(set(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / INDEX}: broken, it names no files ({error!r}); copy it again") from error

    def _files(self) -> dict[str, list[str]]:
        if (self.folder / INDEX).is_file():
            shards = self._shards()
        elif (self.folder / WEIGHTS).is_file():
            shards = [WEIGHTS]
        else:
            if any(self.folder.glob("*.bin")):
                why = "and redpeft reads no pickles; load the model with transformers and save it with save_pretrained"
            else:
                why = "so it holds no model with weights"
            raise UserError(f"{self.folder}: no {WEIGHTS} there, {why}")
        found = {}
        for shard in shards:
            with self.open(shard) as file:
                found[shard] = list(file.keys())
        return found


class KeyMap:
    """Names of a checkpoint's tensors, by their keys in it. transformers renames some tensors while it loads them.

    Attributes:
        written: the name in a folded checkpoint: the model's name where the key differs from it only by the prefix of
            the base model, otherwise the key.
        in_model: the model's name, as far as it is known.
    """

    def __init__(self, keys: Iterable[str], model: PreTrainedModel) -> None:
        keys, state, prefix = list(keys), model.state_dict().keys(), f"{model.base_model_prefix}."
        self.written = {
            key: next((name for name in (key, f"{prefix}{key}", key.removeprefix(prefix)) if name in state), key)
            for key in keys
        }
        self.in_model = self.written | _renamed_by_transformers(keys, model)

    def key_of(self, name: str) -> str:
        """The key of the model's tensor `name`: of the tensor with this name, or with the longest common ending.

        Raises `UserError` where there is none, or several are equally similar.
        """
        alike: dict[int, list[str]] = {}
        for key, own in self.in_model.items():
            if own == name:
                return key
            alike.setdefault(_same_ending(own, name), []).append(key)
        best = max(alike, default=0)
        if best <= LONG_ENDING or len(alike[best]) > 1:
            raise UserError(
                f"cannot tell which tensor of the checkpoint is {name}: transformers converts it while it loads; load "
                "the base model and save it with save_pretrained(..., save_original_format=False) first"
            )
        return alike[best][0]


def _renamed_by_transformers(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The model's names of tensors that transformers 5 renames, without those that it computes from several
    tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return {}
    transforms, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    found = {}
    for key in sorted(keys):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converter is None and name in state:
            found[key] = name
    return found


def _same_ending(left: str, right: str) -> int:
    """The number of equal parts at the end of two dotted names."""
    count = 0
    for one, other in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if one != other:
            return count
        count += 1
    return count


def checkpoint_fingerprint(
    sites: Mapping[str, str], model: PreTrainedModel, checkpoint: Checkpoint, keys: KeyMap
) -> dict | None:
    """The same as `fingerprint`, from a checkpoint's tensors; only the sampled values are read.

    `sites`: an adapter's names of the edited modules, and their names in `model`, which needs no weights. None where
    it cannot be computed: quantised weights, modules without a weight of their own (mixtures of experts). Raises
    `UserError` where a tensor cannot be identified, as `KeyMap.key_of` does.
    """
    found = sites.values()
    has_weights = all(hasattr(model.get_submodule(site), "weight") for site in found)
    if not has_weights or any(is_quantised(model.config, site) for site in found):
        return None
    return fingerprint_of({name: checkpoint.read(keys.key_of(f"{site}.weight")) for name, site in sites.items()})


def is_quantised(config: PretrainedConfig, site: str) -> bool:
    """Whether the checkpoint stores this module's weight in a quantised form, by its configuration."""
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) or settings is None else settings.to_dict()
    if not settings:
        return False
    plain = settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ()
    return not any(name in site for name in plain)


def companions(folder: Path) -> Iterator[Path]:
    """The files of a model's folder besides weights and configuration, as paths in it: tokenizer, chat templates,
    code, licences, and all files in the folders of sentence-transformers' modules (`1_Pooling`).

    Raises `UserError` for a modules.json that names folders outside this one.
    """
    for file in sorted(folder.iterdir()):
        skipped = file.name in REPLACED or file.name.startswith(".") or file.name.endswith(WEIGHT_FORMATS)
        if file.is_file() and not skipped:
            yield Path(file.name)
    for name in ("chat_templates", "additional_chat_templates", *_sentence_modules(folder / "modules.json")):
        yield from (file.relative_to(folder) for file in sorted((folder / name).rglob("*")) if file.is_file())


def _sentence_modules(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        names = [str(part["path"]) for part in json.loads(file.read_text(encoding="utf-8")) if part["path"]]
        if any(map(escapes_root, names)):
            raise ValueError("a path outside the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: broken, it names no modules ({error!r}); copy it again") from error
    return names


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model, which is a path or a Hub name. From the Hub everything but pickles is downloaded."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", *NOT_WEIGHTS]))
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no folder and no model on the Hub has this name ({first_line(error)})") from error

"""The weights of a base model's folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from redpeft.errors import UserError, first_line
from redpeft.storage import escapes_root

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is asked of the hub beside the weights; of the folders those that sentence-transformers numbers.
NOT_WEIGHTS = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.spm", "*.codes", "*.bpe", "*.py"),
    *("LICENSE*", "NOTICE*", "[0-9]*_*/*"),
)
WEIGHT_FORMATS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".npz", ".pkl"),
    *(".tflite", ".mlmodel", ".index.json"),
)
WRITTEN_ANEW = ("config.json", "adapter_config.json", "README.md")


class Checkpoint:
    """`files`: the names of the safetensors files, each with its tensors' names. Raises `UserError` for a folder
    without such weights, a pickle among them, and files that are missing or corrupt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            raise UserError(
                f"{self.folder}: no {WEIGHTS} there, and redpeft reads no pickles; load the model with transformers "
                "and save it with save_pretrained, which writes one"
            )
        found = {}
        for shard in shards:
            with self.open(shard) as file:
                found[shard] = list(file.keys())
        return found


def companions(folder: Path) -> Iterator[Path]:
    """What a model's folder holds beside its weights and configuration, as paths in it: the tokenizer, chat templates,
    code, licences; and the folders of sentence-transformers' own modules (`1_Pooling`), whatever is in them.

    Raises `UserError` for a modules.json that names no folders below this one.
    """
    for file in sorted(folder.iterdir()):
        passed_over = file.name in WRITTEN_ANEW or file.name.startswith(".") or file.name.endswith(WEIGHT_FORMATS)
        if file.is_file() and not passed_over:
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
    """The folder of a model, a path or a hub name: then it is downloaded, pickles left out."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", *NOT_WEIGHTS]))
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no folder and no model on the Hub has this name ({first_line(error)})") from error

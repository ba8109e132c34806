"""redpeft: RED (Representation EDiting, arXiv 2402.15179) for Hugging Face PEFT.

Importing this package registers RED with PEFT: after it, whatever works with a `PeftModel` works with a `RedConfig`.
That is done at once if `peft` is imported already, and otherwise when it is, so that `import redpeft` alone (as in
`redpeft --help`) takes no time: PEFT brings torch and transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from redpeft import errors as errors
from redpeft.import_hook import after_import

if TYPE_CHECKING:
    from redpeft.tuner import RedConfig, RedLayer, RedModel, Site, calibrate, find_sites

__version__ = "0.1.0"

__all__ = ["RedConfig", "RedLayer", "RedModel", "Site", "calibrate", "find_sites"]

METHOD = "redpeft.tuner"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(METHOD), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    if METHOD not in sys.modules:  # otherwise its import is under way, which ends with registering
        importlib.import_module(METHOD)


def _refuse_lost_biases() -> None:
    generation = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration
    importlib.import_module("redpeft.tuner.model").refuse_lost_biases(generation)


after_import("peft", _register)
after_import("trl.generation.vllm_generation", _refuse_lost_biases)

"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch


def machine() -> dict[str, str]:
    """Processor, memory, graphics cards and system of this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": ", ".join(gpus) or "none",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions_of(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The versions of libraries that runs were made with, by their results."""
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result["versions"].items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


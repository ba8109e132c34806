"""Check, when an engine starts, that edits change its output: with an edit at each site in turn, and without any.

An engine that does not call a module (special kernels, another model runner, a graph captured without the edit) would
answer as the base model does, without any sign of it. So the engine's own outputs are compared: one batch of short
prompts, with the same token after each, so that one step of decoding is checked too.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample import sampler

from redpeft.errors import UserError, shorten_list
from redpeft.serving.options import KEY, Options
from redpeft.serving.vllm_internals.engine import CHECK, RedWorkerManager

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

_count = sampler.batched_count_greater_than
logger = init_logger("vllm.redpeft")

FIRST = 2**30  # number of the check's first adapter; a server counts its own from 1
PROMPT, NEXT = [5, 11, 7, 3], 9
LOGPROBS = 20
# By how much an edit has to change a logprob: at least LEAST, and TIMES what two answers of the base differ by
TIMES, LEAST = 5.0, 1e-3

Logprobs = list[dict[int, float]]  # at each step, by token


def run(core: EngineCore) -> None:
    """Raise `UserError` where an edit changes nothing, or there are no tables. A server for which RED was not asked
    starts nevertheless, and refuses RED adapters."""
    config = core.vllm_config
    options = Options.of(config.additional_config)
    if config.lora_config is None or not options.check:
        return
    if core.is_pooling_model:
        logger.info("whether edits act was not checked: this model generates nothing")
        return
    began = time.monotonic()
    found = core.collective_rpc(_sites)
    sites = list(dict.fromkeys(site for rank in found for site in rank or ()))
    problem = ""
    if None in found:
        problem = "vLLM's model runner does not use the plug-in"
    elif sites:
        base, edited, again = _logprobs(core, sites)
        noise = _distance(base, again)
        idle = [site for site, each in edited.items() if not _distance(base, each) > max(LEAST, TIMES * noise)]
        problem = (
            f"an edit of {shorten_list(idle)} does not change what vLLM answers, or not in each step" if idle else ""
        )
    if not problem:
        logger.info("edits act at %d sites (checked in %.1f s)", len(sites), time.monotonic() - began)
        return
    problem = f"{problem}: adapters would answer as the base model does; fold them into it (redpeft fold)"
    if options.explicit:
        raise UserError(f'{problem}, or switch this check off: {{"{KEY}": {{"check": false}}}} in --additional-config')
    logger.warning("RED adapters cannot be served: %s", problem)
    core.collective_rpc(_refuse, args=(problem,))


def _logprobs(core: EngineCore, sites: list[str]) -> tuple[Logprobs, dict[str, Logprobs], Logprobs]:
    """Of the base, of an edit at each site, and of the base again, in one batch."""
    sites_of_requests: list[str | None] = [None, *sites, None]
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    sampling: dict[str, Any] = {}
    if core.vllm_config.model_config.logprobs_mode.startswith("raw"):  # the other modes would mask the logprobs too
        sampling["allowed_token_ids"] = [NEXT % vocabulary]
    answers: dict[str, Logprobs] = {}
    core.collective_rpc(_begin)
    for number, site in enumerate(sites_of_requests):
        request = EngineCoreRequest(
            request_id=f"{CHECK}{number}",
            prompt_token_ids=[token % vocabulary for token in PROMPT],
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0, max_tokens=2, ignore_eos=True, logprobs=min(LOGPROBS, vocabulary), **sampling
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=site and LoRARequest(f"{CHECK}{number}", FIRST + number, f"{CHECK}{site}"),
            cache_salt=None,
            data_parallel_rank=None,
        )
        answers[request.request_id] = []
        core.add_request(*core.preprocess_add_request(request))
    while core.scheduler.has_requests() or core.batch_queue:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        for output in (one for part in (outputs or {}).values() for one in part.outputs):
            answers[output.request_id] += _steps(output.new_logprobs)
    core.collective_rpc(_end)
    first, *edited, last = answers.values()
    return first, dict(zip(sites, edited, strict=True)), last


def _steps(found: LogprobsLists | None) -> Logprobs:
    if found is None:
        return []
    rows = zip(found.logprob_token_ids.tolist(), found.logprobs.tolist(), strict=True)
    return [dict(zip(tokens, logprobs, strict=True)) for tokens, logprobs in rows]


def _distance(one: Logprobs, other: Logprobs) -> float:
    """The largest difference of a token's logprob, in the step where it is smallest."""
    return min((_step_distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _step_distance(one: dict[int, float], other: dict[int, float]) -> float:
    gaps = [abs(one[token] - other[token]) for token in one.keys() & other.keys()]
    return math.inf if not gaps or any(map(math.isnan, gaps)) else max(gaps)


# Run on the workers, each of which passes itself as the argument


def _manager(worker: Any) -> RedWorkerManager | None:
    found = getattr(worker.model_runner, "lora_manager", None)
    return found if isinstance(found, RedWorkerManager) else None


def _sites(worker: Any) -> list[str] | None:
    """The sites that have a table on this rank; None: the worker does not use the plug-in."""
    manager = _manager(worker)
    return None if manager is None else list(manager._adapter_manager.modules_of_sites)


def _begin(worker: Any) -> None:
    """Use the uncompiled form of a count that vLLM returns with logprobs. The check does not need it, and compiling it
    would take most of the time."""
    sampler.batched_count_greater_than = _count.__wrapped__


def _end(worker: Any) -> None:
    sampler.batched_count_greater_than = _count
    if (manager := _manager(worker)) is not None:
        manager.remove_all_adapters()


def _refuse(worker: Any, problem: str) -> None:
    if (manager := _manager(worker)) is not None:
        manager._adapter_manager.problem = problem

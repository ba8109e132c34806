"""Whether edits act: when an engine starts, it is asked with an edit at each site in turn, and without any.

An engine that passed a module by (kernels of its own, another model runner, a graph captured without the edit) would
answer as the base model does, and nothing would show it. So what is compared is the engine's own output: one batch of
short prompts, with the same token after each, so that one step of decoding is seen as well.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample import sampler

from redpeft.adapters import EffectiveEdit
from redpeft.errors import UserError, some
from redpeft.serving.options import KEY, Options

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

_count = sampler.batched_count_greater_than
logger = init_logger("vllm.redpeft")

SITE = "redpeft-check:"  # as the path of a request's adapter: of the edit at the site that follows
FIRST = 2**30  # number of such an adapter; a server counts its own from 1
PROMPT, NEXT = [5, 11, 7, 3], 9
LOGPROBS = 20
# How far an edit has to move one of these, beside what two answers of the base differ by (16 bits round)
TIMES, LEAST = 5.0, 1e-3

Answer = list[dict[int, float]]  # at each step, logprobs by token


def known_edit(width: int) -> EffectiveEdit:
    """Acts on outputs of any size, small ones and zeros too, and keeps within fp16."""
    signs = 1.0 - 2.0 * (torch.arange(width) % 2)
    return EffectiveEdit(torch.full((width,), -4.0), signs)


def checked_site(lora_request: LoRARequest) -> str | None:
    """The site that a request of the check edits; None for any other request."""
    path = lora_request.lora_path
    return path.removeprefix(SITE) if path.startswith(SITE) else None


def run(core: EngineCore) -> None:
    """Raise `UserError` where an edit changes nothing, or no tables are there; a server that nobody has asked to serve
    RED starts without it then."""
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
        problem = "vLLM's model runner has not taken the plug-in"
    elif sites:
        base, edited, again = _answers(core, sites)
        noise = _distance(base, again)
        idle = [site for site, each in edited.items() if not _distance(base, each) > max(LEAST, TIMES * noise)]
        problem = f"an edit of {some(idle)} does not change what vLLM answers, or not in each step" if idle else ""
    if not problem:
        logger.info("edits act at %d sites, as tried in %.1f s", len(sites), time.monotonic() - began)
        return
    problem = f"{problem}: adapters would answer as the base model does; fold them into it (redpeft fold)"
    if options.explicit:
        raise UserError(f'{problem}, or go without this check: {{"{KEY}": {{"check": false}}}} in --additional-config')
    logger.warning("RED adapters cannot be served: %s", problem)
    core.collective_rpc(_refuse, args=(problem,))


def _answers(core: EngineCore, sites: list[str]) -> tuple[Answer, dict[str, Answer], Answer]:
    """The base's, those with an edit of each site, and the base's again, all asked at once."""
    asked: list[str | None] = [None, *sites, None]
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    told: dict[str, Any] = {}
    if core.vllm_config.model_config.logprobs_mode.startswith("raw"):  # of the others the next token is a part
        told["allowed_token_ids"] = [NEXT % vocabulary]
    answers: dict[str, Answer] = {}
    core.collective_rpc(_begin)
    for number, site in enumerate(asked):
        request = EngineCoreRequest(
            request_id=f"{SITE}{number}",
            prompt_token_ids=[token % vocabulary for token in PROMPT],
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0, max_tokens=2, ignore_eos=True, logprobs=min(LOGPROBS, vocabulary), **told
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=site and LoRARequest(f"{SITE}{number}", FIRST + number, f"{SITE}{site}"),
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
    core.collective_rpc(_forget)
    first, *edited, last = answers.values()
    return first, dict(zip(sites, edited, strict=True)), last


def _steps(found: LogprobsLists | None) -> Answer:
    if found is None:
        return []
    rows = zip(found.logprob_token_ids.tolist(), found.logprobs.tolist(), strict=True)
    return [dict(zip(tokens, logprobs, strict=True)) for tokens, logprobs in rows]


def _distance(one: Answer, other: Answer) -> float:
    """By how much the logprob of a token differs at most, in the step where that is least."""
    return min((_apart(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _apart(one: dict[int, float], other: dict[int, float]) -> float:
    gaps = [abs(one[token] - other[token]) for token in one.keys() & other.keys()]
    return math.inf if not gaps or any(map(math.isnan, gaps)) else max(gaps)


# On the workers, each of which calls these with itself


def _manager(worker: Any) -> Any:
    from redpeft.serving.vllm_internals.engine import RedWorkerManager

    found = getattr(worker.model_runner, "lora_manager", None)
    return found if isinstance(found, RedWorkerManager) else None


def _sites(worker: Any) -> list[str] | None:
    """The sites that have a table here."""
    manager = _manager(worker)
    return manager and list(manager._adapter_manager.places)


def _begin(worker: Any) -> None:
    """A count that comes with logprobs, at which the check does not look, is not compiled for it: that would take most
    of the time."""
    sampler.batched_count_greater_than = _count.__wrapped__


def _forget(worker: Any) -> None:
    sampler.batched_count_greater_than = _count
    _manager(worker).remove_all_adapters()


def _refuse(worker: Any, problem: str) -> None:
    if (manager := _manager(worker)) is not None:
        manager._adapter_manager.problem = problem

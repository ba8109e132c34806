"""Counts by adapter, in addition to vLLM's own metrics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from vllm.entrypoints.serve.instrumentator import metrics as endpoint
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.loggers import PrometheusStatLogger

from redpeft.serving.counters import COUNTED, Counters, read_counts, share

counters = Counters()
MOST_MIXES = 256  # of adapters in a batch


class AdapterCounts(Collector):
    """A counter for each of `COUNTED`, `redpeft:<name>_total`, by `adapter_name`."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        counters.write()
        total = read_counts()
        for name, meaning in COUNTED.items():
            family = CounterMetricFamily(f"redpeft:{name}", meaning, labels=["adapter_name"])
            for adapter, counts in total.items():
                if name in counts:
                    family.add_metric([adapter], counts[name])
            yield family


def _with_counts(get_registry: Callable[[], CollectorRegistry]) -> Callable[[], CollectorRegistry]:
    @functools.wraps(get_registry)
    def get() -> CollectorRegistry:
        registry = get_registry()
        with contextlib.suppress(ValueError):  # registered already: the process has one registry
            registry.register(AdapterCounts())
        return registry

    return get


def _counted(update: Callable[..., None]) -> Callable[..., None]:
    """vLLM's statistics of each output of the engine, counted by adapter too. A request's first output counts its
    prompt."""

    @functools.wraps(update)
    def count(processor: OutputProcessor, state: RequestState, output: Any, *args: Any) -> None:
        update(processor, state, output, *args)
        if state.lora_name is None or not processor.log_stats:
            return
        if state.is_prefilling:
            counters.add(state.lora_name, requests=1, prompt_tokens=state.prompt_len)
        counters.add(state.lora_name, generation_tokens=len(output.new_token_ids))

    return count


def _bounded(record: Callable[..., None]) -> Callable[..., None]:
    """vLLM's gauge of running and waiting adapters has a series for each combination of adapters that ever occurred.
    It is cleared when there are too many."""

    @functools.wraps(record)
    def keep_few(logger: PrometheusStatLogger, *args: Any, **kwargs: Any) -> None:
        gauge = logger.gauge_lora_info
        if gauge is not None and len(gauge._metrics) > MOST_MIXES:
            gauge.clear()
        record(logger, *args, **kwargs)

    return keep_few


def _with_folder(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def build(engine: AsyncLLM, *args: Any, **kwargs: Any) -> None:
        share()  # before the engine's processes start
        init(engine, *args, **kwargs)

    return build


def install() -> None:
    AsyncLLM.__init__ = _with_folder(AsyncLLM.__init__)
    endpoint.get_prometheus_registry = _with_counts(endpoint.get_prometheus_registry)
    PrometheusStatLogger.record = _bounded(PrometheusStatLogger.record)
    OutputProcessor._update_stats_from_output = _counted(OutputProcessor._update_stats_from_output)

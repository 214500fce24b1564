"""The engine's counters for Prometheus: ``pip install 'lora-engine[prometheus]'``.

    from lora_engine.prometheus import register
    register()                          # then serve prometheus_client's registry as usual

    lora_engine_forward_duration_seconds    histogram, from one call in 16, times 16
    lora_engine_adapt_duration_seconds      likewise
    lora_engine_skipped_updates_total       rows whose step was not finite
    lora_engine_resident_adapters           in pools of this process, on the CPU
    lora_engine_evictions_total             of the stores given

No label names an adapter or a user: there may be millions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from lora_engine.counters import TIMED_EVERY, OpCounters, counters

if TYPE_CHECKING:
    from lora_engine.adapters.store import AdapterStore

_FIRST = 1e-6  # seconds: the least bucket; each next is twice as long


def _histogram(name: str, what: str, op: OpCounters) -> HistogramMetricFamily:
    """Of the timed calls, TIMED_EVERY times each, so that rates mean calls. By a constant: a
    series that goes down is a restart to Prometheus."""
    buckets, so_far = [], 0
    for i, count in enumerate(op.buckets):
        so_far += count
        last = i == len(op.buckets) - 1
        buckets.append(("+Inf" if last else repr(_FIRST * 2**i), TIMED_EVERY * so_far))
    return HistogramMetricFamily(name, what, buckets=buckets, sum_value=TIMED_EVERY * op.seconds)


class EngineCollector:
    """A collector of prometheus_client. stores: whose evictions are told."""

    def __init__(self, stores: Sequence[AdapterStore] = ()) -> None:
        self.stores = tuple(stores)

    def describe(self) -> Iterator[Any]:
        """What ``collect`` yields: by it a registry refuses the same names twice."""
        return self.collect()

    def collect(self) -> Iterator[Any]:
        now = counters()
        yield _histogram("lora_engine_forward_duration_seconds", "Forward of adapters", now.forward)
        yield _histogram("lora_engine_adapt_duration_seconds", "Steps of adapters", now.adapt)
        yield CounterMetricFamily(
            "lora_engine_skipped_updates", "Rows whose step was not finite", value=now.skipped
        )
        yield GaugeMetricFamily(
            "lora_engine_resident_adapters", "Adapters in pools", value=now.resident
        )
        if self.stores:
            evictions = sum(store.evictions for store in self.stores)
            yield CounterMetricFamily(
                "lora_engine_evictions", "Adapters that left their store's pool", value=evictions
            )


def register(
    registry: CollectorRegistry = REGISTRY, stores: Sequence[AdapterStore] = ()
) -> EngineCollector:
    """Adds the engine's metrics to a registry; give the result to ``registry.unregister``.

    Raises ValueError where they are in it already.
    """
    collector = EngineCollector(stores)
    registry.register(collector)
    return collector

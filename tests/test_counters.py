"""What the engine counts, and what Prometheus is told of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import lora_engine as le
from lora_engine.counters import TIMED_EVERY, Counters, counters
from lora_engine.prometheus import register

N = 64


@pytest.fixture
def pool() -> le.AdapterPool:
    made = le.AdapterPool(N, N)
    rng = np.random.default_rng(0)
    for _ in range(3):
        made.add(rng.standard_normal((2, N), dtype="f4"), np.ones((N, 2), "f4"), 1.0)
    return made


X = np.ones((4, N), np.float32)
IDS = np.array([0, 1, 2, -1], np.int32)


def _rise(before: Counters, after: Counters) -> tuple[int, int, int]:
    return (
        after.forward.calls - before.forward.calls,
        after.adapt.calls - before.adapt.calls,
        after.skipped - before.skipped,
    )


def test_calls_of_every_door_are_counted(pool: le.AdapterPool) -> None:
    lora = le.MicroLoRA(le.MicroLoRAConfig.for_hidden_dim(N))
    before = counters()
    for _ in range(5):
        pool.forward(X, IDS)
    pool.adapt(X, X, IDS, lr=1e-3)
    lora.forward(X, "q_proj")
    lora.adapt(X, le.Feedback.from_gradient(X), "q_proj", lr=1e-3)
    with pytest.raises(IndexError):
        pool.forward(X, IDS + 100)
    assert _rise(before, counters()) == (7, 2, 0)


def test_sona_tells_the_same() -> None:
    micro = le.MicroLoRAConfig(N, N, rank=2, target_modules=("q",))
    sona = le.Sona(le.SonaConfig(micro_lora=micro))
    before = counters()
    for _ in range(3):
        sona.instant_adapt(X[0], le.Feedback.from_gradient(X[0]))
    assert sona.stats().engine == counters()
    assert _rise(before, sona.stats().engine)[1] == 3


def test_rows_that_were_not_finite_are_skipped_updates(pool: le.AdapterPool) -> None:
    before = counters()
    x = X.copy()
    x[1, 3] = np.nan
    result = pool.adapt(x, X, IDS, lr=1e-3)
    assert result.applied.tolist() == [True, False, True, False]
    assert _rise(before, counters()) == (0, 1, 1)  # a row of no adapter is none


def test_one_call_in_timed_every_of_a_thread_is_timed(pool: le.AdapterPool) -> None:
    before = counters()

    def serve() -> None:
        for _ in range(100 * TIMED_EVERY):
            pool.forward(X, IDS)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = counters()  # of threads that have ended, too
    assert after.forward.calls - before.forward.calls == 300 * TIMED_EVERY
    assert 240 < after.forward.timed - before.forward.timed < 360
    assert sum(after.forward.buckets) == after.forward.timed
    assert after.forward.seconds > before.forward.seconds


def test_calls_that_alternate_are_timed_alike(pool: le.AdapterPool) -> None:
    """A long one in every two: about half of the timed ones are long."""
    long = np.ones((1024, N), np.float32)
    ids = np.zeros(1024, np.int32)
    before = counters().forward
    for _ in range(50 * TIMED_EVERY):
        pool.forward(X, IDS)
        pool.forward(long, ids)
    after = counters().forward
    risen = [b - a for a, b in zip(before.buckets, after.buckets, strict=True)]
    slow = sum(risen[6:])  # over 32 us
    assert 0.25 < slow / sum(risen) < 0.75


def test_resident_counts_adapters_in_pools(pool: le.AdapterPool) -> None:
    at = counters().resident
    pool.remove(1)
    assert counters().resident == at - 1
    del pool
    assert counters().resident <= at - 1


def test_a_fork_finds_its_counters_free(pool: le.AdapterPool) -> None:
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            counters()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                pool.forward(X, IDS)
                os._exit(0 if counters().forward.calls else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        watcher.join()


# ---- Prometheus ----


def test_prometheus_tells_evictions_of_the_stores_given(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with le.AdapterStore(tmp_path, resident=2, in_features=N, out_features=N) as store:
        register(registry, [store])
        for user in "abcde":
            store.slot(user)
        assert registry.get_sample_value("lora_engine_evictions_total") == 3


def test_prometheus_reads_the_counters(pool: le.AdapterPool) -> None:
    for _ in range(100):
        pool.forward(X, IDS)
    pool.adapt(X, X, IDS, lr=1e-3)
    registry = CollectorRegistry()
    collector = register(registry)
    text = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    now = counters()
    for name, op in (("forward", now.forward), ("adapt", now.adapt)):
        family = families[f"lora_engine_{name}_duration_seconds"]
        samples = {(s.name, s.labels.get("le")): s.value for s in family.samples}
        assert samples[f"{family.name}_count", None] == TIMED_EVERY * op.timed
        assert samples[f"{family.name}_bucket", "+Inf"] == TIMED_EVERY * op.timed
        assert samples[f"{family.name}_sum", None] == TIMED_EVERY * op.seconds
        edges = [s for s in family.samples if s.name.endswith("_bucket")]
        assert float(edges[0].labels["le"]) == 1e-6
        values = [s.value for s in edges]
        assert values == sorted(values)
    assert families["lora_engine_resident_adapters"].samples[0].value == now.resident
    assert families["lora_engine_skipped_updates"].samples[0].value == now.skipped
    labels = {key for family in families.values() for s in family.samples for key in s.labels}
    assert labels == {"le"}  # nobody's name
    with pytest.raises(ValueError, match="Duplicated"):
        register(registry)
    registry.unregister(collector)


def test_no_series_goes_down(pool: le.AdapterPool) -> None:
    """Prometheus takes that for a restart."""
    registry = CollectorRegistry()
    register(registry)

    def scraped() -> dict[tuple[str, str | None], float]:
        families = [f for f in registry.collect() if f.type in ("counter", "histogram")]
        return {(s.name, s.labels.get("le")): s.value for f in families for s in f.samples}

    before = scraped()
    for i in range(200):
        pool.forward(X, IDS)
        pool.adapt(X, X, IDS, lr=1e-6)
        if i % 3 == 0:
            now = scraped()
            assert all(now[name] >= value for name, value in before.items())
            before = now

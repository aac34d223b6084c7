"""The worker's Prometheus metrics, read from the engine when somebody scrapes.

Nothing is counted per token here: the engine keeps plain integers, and a collector turns them into
families on demand.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.worker_info import WorkerInfo
from worker.engine.base import Engine
from worker.outbox import Outbox

_LABELS: Final = ["model", "role", "worker"]


class WorkerCollector(Collector):
    """Families of one worker."""

    def __init__(self, engine: Engine, outbox: Outbox, info: WorkerInfo) -> None:
        self._engine = engine
        self._outbox = outbox
        self._labels = [info.model, info.role, info.worker_id]
        self._running = info.transports
        self._reasons = info.transport_reasons

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()

    def _gauges(self) -> Iterator[Metric]:
        load = self._engine.load()
        used = load.num_blocks - load.free_blocks - load.lent_blocks - load.quarantined_blocks
        states = {
            "used": max(used, 0),
            "free": load.free_blocks - load.cached_blocks,
            "cached": load.cached_blocks,
            "lent": load.lent_blocks,
            "quarantined": load.quarantined_blocks,
        }
        blocks = GaugeMetricFamily(
            "baton_kv_blocks", "KV blocks by state.", labels=[*_LABELS, "state"]
        )
        for state, count in states.items():
            blocks.add_metric([*self._labels, state], count)
        yield blocks
        yield from self._transports()
        yield self._gauge("baton_worker_running", "Sequences in the batch.", load.running)
        yield self._gauge("baton_worker_waiting", "Sequences waiting for blocks.", load.waiting)
        yield self._gauge("baton_worker_records", "Attempts kept for replay.", len(self._outbox))

    def _transports(self) -> Iterator[Metric]:
        """One series for each transport, and one for each source that the engine remembers."""
        available = GaugeMetricFamily(
            "baton_kv_transfer_available",
            "1 if the transport runs here, and why (not).",
            labels=[*_LABELS, "transport", "reason"],
        )
        for transport, reason in self._reasons.items():
            runs = 1 if transport in self._running else 0
            available.add_metric([*self._labels, transport, reason], runs)
        yield available
        pairs = GaugeMetricFamily(
            "baton_kv_transfer_pairs",
            "The transport over which a source worker's KV comes here, and why that one.",
            labels=[*_LABELS, "source", "transport", "reason"],
        )
        for source, (transport, reason) in self._engine.stats().pairs.items():
            pairs.add_metric([*self._labels, source, transport, reason], 1)
        yield pairs

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        leases = CounterMetricFamily(
            "baton_leases_ended", "Leases on lent blocks by end.", labels=[*_LABELS, "end"]
        )
        for end, count in stats.leases_ended.items():
            leases.add_metric([*self._labels, end], count)
        yield leases
        pulls = CounterMetricFamily(
            "baton_pulls",
            "Pulls by transport and result.",
            labels=[*_LABELS, "transport", "result"],
        )
        for (transport, result), count in stats.transfers.items():
            pulls.add_metric([*self._labels, transport, result], count)
        yield pulls
        pulled = CounterMetricFamily(
            "baton_pulled_bytes", "KV bytes pulled by transport.", labels=[*_LABELS, "transport"]
        )
        for transport, count in stats.transfer_bytes.items():
            pulled.add_metric([*self._labels, transport], count)
        yield pulled
        tokens = CounterMetricFamily(
            "baton_worker_tokens", "Tokens by kind.", labels=[*_LABELS, "kind"]
        )
        tokens.add_metric([*self._labels, "prefilled"], stats.prefilled_tokens)
        tokens.add_metric([*self._labels, "cached"], stats.cached_tokens)
        tokens.add_metric([*self._labels, "decoded"], stats.decoded_tokens)
        yield tokens
        yield self._counter("baton_preemptions", "Sequences put back.", stats.preemptions)
        yield self._counter("baton_engine_steps", "Engine steps.", self._engine.load().steps)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family


def worker_registry(engine: Engine, outbox: Outbox, info: WorkerInfo) -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(WorkerCollector(engine, outbox, info))
    return registry

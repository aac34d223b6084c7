"""The router's Prometheus metrics. Children are bound once per model; nothing is per token."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from router.pairs import TransferPairs
from router.series import Histogram, Numbers

_TIMES: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120,
)  # fmt: skip
_GAPS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAGS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _ModelMetrics:
    """Bound children of one model."""

    __slots__ = ("gap", "inflight", "prefill", "queue", "ttft", "worker_queue")

    def __init__(self, owner: "RouterMetrics", model: str) -> None:
        self.ttft = owner.ttft.of(model)
        self.gap = owner.itl.of(model)
        self.queue = owner.queue.of(model)
        self.worker_queue = owner.worker_queue.of(model)
        self.prefill = owner.prefill.of(model)
        self.inflight = owner.inflight.of(model)


class RouterMetrics:
    """One per router process, on its own registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        r = registry
        self.ttft = Histogram(
            "baton_ttft_seconds", "Submit to first token at the client edge.", ["model"],
            buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.itl = Histogram(
            "baton_inter_token_latency_seconds",
            "Gap between consecutive deltas of a stream, sampled once per frame.",
            ["model"], buckets=_GAPS, registry=r,
        )  # fmt: skip
        self.e2e = Histogram(
            "baton_choice_seconds", "Submit to the end of a choice.", ["model", "outcome"],
            buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.queue = Histogram(
            "baton_queue_seconds", "Submit to the first dispatch.", ["model"],
            buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.worker_queue = Histogram(
            "baton_prefill_queue_seconds", "Wait inside the prefill worker.", ["model"],
            buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.prefill = Histogram(
            "baton_prefill_seconds", "Prefill computation of one leg.", ["model"],
            buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.transfer_time = Histogram(
            "baton_kv_transfer_seconds", "Pull of a handle's blocks, check included.",
            ["model", "transport"], buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.handle_age = Histogram(
            "baton_handle_age_seconds", "A handle's arrival to the release of its blocks: decoding "
            "started.", ["model"], buckets=_TIMES, registry=r,
        )  # fmt: skip
        self.loop_lag = Histogram(
            "baton_loop_lag_seconds", "How late the loop was, ten looks a second.", [],
            buckets=_LAGS, registry=r,
        ).of()  # fmt: skip
        self.transfer_bytes = Numbers(
            "baton_kv_transfer_bytes", "KV bytes handed over.", ["model", "transport"], registry=r
        )
        self.transfers = Numbers(
            "baton_kv_transfers", "KV hand-offs completed.", ["model", "transport"], registry=r
        )
        self.inflight = Numbers(
            "baton_inflight_choices", "Choices submitted and not ended.", ["model"], registry=r,
            is_gauge=True,
        )  # fmt: skip
        self.queued = Gauge("baton_queued_choices", "Choices waiting for a worker.", registry=r)
        self.workers = Gauge(
            "baton_workers", "Workers by model, role and state.", ["model", "role", "state"],
            registry=r,
        )  # fmt: skip
        self.worker_load = Gauge(
            "baton_worker_reservations", "Live reservations charged to a worker.",
            ["model", "role", "worker"], registry=r,
        )  # fmt: skip
        self.outcomes = Numbers(
            "baton_choices", "Ended choices by outcome, leg and error code.",
            ["model", "outcome", "leg", "code"], registry=r,
        )  # fmt: skip
        self.notes = Numbers(
            "baton_events",
            "Replays, retries, resumes, local prefills, suspicions and others by cause.",
            ["kind", "cause"], registry=r,
        )  # fmt: skip
        self.deltas = Numbers(
            "baton_deltas", "Deltas streamed (one per token or more).", [], registry=r
        ).of()
        self.lost = Counter("baton_bus_lost_messages", "Bus messages known as lost.", registry=r)
        self.http = Numbers(
            "baton_http_requests", "HTTP requests by path and status.", ["path", "status"],
            registry=r,
        )  # fmt: skip
        self.errors = Counter(
            "baton_error_answers",
            "Answers that were an error, over HTTP and NATS, by status and error code.",
            ["status", "code"], registry=r,
        )  # fmt: skip
        self.slow_clients = Counter(
            "baton_slow_clients", "Streams aborted because the client took nothing.", registry=r
        )
        self.tasks = Gauge("baton_tasks", "asyncio tasks of the router.", registry=r)
        self.bus_up = Gauge("baton_bus_up", "1 while connected to the bus.", registry=r)
        self.registry_fresh = Gauge(
            "baton_discovery_synced", "1 while the worker list is in step with etcd.", registry=r
        )
        self.pairs = TransferPairs()
        self._models: dict[str, _ModelMetrics] = {}

    def _of(self, model: str) -> _ModelMetrics:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _ModelMetrics(self, model)
        return found

    def started(self, model: str) -> None:
        self._of(model).inflight.value += 1

    def ended(self, model: str, outcome: str, leg: str, code: str, seconds: float) -> None:
        self._of(model).inflight.value -= 1
        self.outcomes.of(model, outcome, leg, code).value += 1
        self.e2e.of(model, outcome).observe(seconds)

    def queue_time(self, model: str, seconds: float) -> None:
        self._of(model).queue.observe(seconds)

    def prefilled(self, model: str, queue_s: float, prefill_s: float) -> None:
        self._of(model).worker_queue.observe(queue_s)
        self._of(model).prefill.observe(prefill_s)

    def first_token(self, model: str, seconds: float) -> None:
        self._of(model).ttft.observe(seconds)

    def token_gap(self, model: str, seconds: float) -> None:
        self._of(model).gap.observe(seconds)

    def tokens(self, count: int) -> None:
        self.deltas.value += count

    def transfer(self, model: str, transport: str, num_bytes: int, seconds: float) -> None:
        self.transfers.of(model, transport).value += 1
        self.transfer_bytes.of(model, transport).value += num_bytes
        self.transfer_time.of(model, transport).observe(seconds)

    def handle_used(self, model: str, age_s: float) -> None:
        self.handle_age.of(model).observe(age_s)

    def note(self, kind: str, cause: str) -> None:
        self.notes.of(kind, cause).value += 1

    def answered(self, path: str, status: int) -> None:
        self.http.of(path, str(status)).value += 1

    def error_answer(self, status: int, code: str) -> None:
        self.errors.labels(str(status), code).inc()

    def bus_lost(self, count: int) -> None:
        self.lost.inc(count)

"""The fleet that rows break: real processes with short deadlines, and what each says of itself.

A row looks at the router's stories for where a request stands, and at every process's own metrics
for what is left of it: a worker that no router hears must be clean, too.
"""

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from baton.local_servers import free_port
from tests.e2e.fleet import Fleet, Process, is_alive, is_frozen

LEASE_S: Final = 3.0
OUTAGE_TTL_S: Final = 3.0
WORKERS: Final = ("decode-0", "decode-1", "prefill-0", "prefill-1")
LEGS: Final = {
    "silent": 2.5,
    "replaced": 2.5,
    "gone": 2.5,
    "unlisted": 2.5,
    "accept_timeout": 1.0,
    "kv_transfer_timeout": 3.0,
    "prefill_timeout": 3.0,
    "no_replay": 4.0,
    "lease_lost": LEASE_S,
    "lease_expired": LEASE_S,
    "queue_timeout": 10.0,
    "decode_wait_timeout": 10.0,
}
"""Seconds of the deadlines below, by the cause that a story names when they expire. A worker that
is gone shows at the second publish, at the latest by its silence."""
TRANSFER_S: Final = 3.0
SETTINGS: Final = (
    "worker.sim_step_ms=10",
    f"worker.lease_ms={LEASE_S * 1e3:.0f}",
    f"worker.kv_transfer_timeout_ms={TRANSFER_S * 1e3:.0f}",
    f"worker.router_timeout_ms={OUTAGE_TTL_S * 1e3:.0f}",
    "worker.sim_transfer_bytes_per_s=300000",
    "worker.max_step_tokens=256",
    "router.kv_transfer_timeout_ms=3000",
    "router.stall_timeout_ms=3000",
    "router.prefill_timeout_ms=3000",
    "router.queue_timeout_ms=10000",
    "router.decode_wait_timeout_ms=10000",
    "router.client_stall_timeout_ms=3000",
    "router.local_prefill_tokens=64",
)
TRANSPORTS: Final = ("shm", "tcp", "nixl", "nixl-tcp")


@dataclass(frozen=True)
class Step:
    """One line of a request's story in the router."""

    at: float
    """On this machine's monotonic clock."""
    what: str
    detail: str


class ChaosFleet(Fleet):
    """`baton up` with two and two, on one transport."""

    def __init__(
        self,
        folder: Path,
        transport: str,
        *,
        prefill: int = 2,
        decode: int = 2,
        settings: Sequence[str] = (),
    ) -> None:
        """`settings` are set over those of this file."""
        self.transport = transport
        self.folder = folder
        self._metrics_at: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        name = "nixl" if transport.startswith("nixl") else transport
        settings = [
            *SETTINGS,
            *(f"{role}.sim_hold={self.hold_file(role)}" for role in ("prefill", "decode")),
            *settings,
        ]
        flags = [f"--transfer={name}"]
        super().__init__(folder, prefill=prefill, decode=decode, settings=settings, flags=flags)

    def start(self) -> "ChaosFleet":
        with ucx_over(self.transport):
            super().start()
        return self

    def hold_file(self, role: str) -> Path:
        return self.folder / f"hold-{role}"

    @contextlib.contextmanager
    def held(self, role: str) -> Iterator[None]:
        """No engine step of that role ends inside of the block; `""`: nobody is held."""
        if role:
            self.hold_file(role).touch()
        try:
            yield
        finally:
            if role:
                self.hold_file(role).unlink(missing_ok=True)

    def add_like(self, name: str, role: str, *flags: str) -> Process:
        """One more worker with this fleet's settings; `flags` win."""
        settings = [
            "--" + setting.partition(".")[2].replace("_", "-")
            for setting in SETTINGS
            if setting.startswith("worker.")
        ]
        kind = "nixl" if self.transport.startswith("nixl") else self.transport
        own = [f"--transfer={kind}", f"--sim-hold={self.hold_file(role)}"]
        self._metrics_at.pop(name, None)
        port = free_port()
        with ucx_over(self.transport):
            return self.add_worker(name, role, *settings, *own, f"--metrics-port={port}", *flags)

    def restart(self, name: str) -> Process:
        with ucx_over(self.transport):
            return super().restart(name)

    # --- what processes say ---

    def story(self, request_id: str, port: int | None = None) -> list[Step]:
        """Empty if the router knows nothing of it."""
        try:
            status, body = self.get(f"/debug/requests/{request_id}", port)
        except OSError:
            return []
        if status != 200:
            return []
        choices = json.loads(body)["choices"]
        lines = choices[0]["story"] if choices else []
        return [Step(line["at_s"], *line["what"].partition(" ")[::2]) for line in lines]

    def worker_metrics(self, name: str) -> dict[str, float]:
        """Of the process itself: `used`, `lent`, `quarantined` blocks, `running`, `waiting`."""
        if name not in self._metrics_at:
            given = (flag.partition("=") for flag in self.command(name))
            flags = {"--host": "127.0.0.1"} | {flag: value for flag, _, value in given}
            self._metrics_at[name] = f"{flags['--host']}:{flags['--metrics-port']}"
        url = f"http://{self._metrics_at[name]}/metrics"
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            text = answer.read().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "baton_kv_blocks":
                    found[sample.labels["state"]] = sample.value
                elif sample.name in ("baton_worker_running", "baton_worker_waiting"):
                    found[sample.name.removeprefix("baton_worker_")] = sample.value
        return found

    def learn_ports(self) -> None:
        """While everybody lives: a dead one cannot be asked where its metrics are."""
        for process in self.processes:
            if process.role in ("prefill", "decode") and is_alive(process.pid):
                self.worker_metrics(process.name)

    def workers(self) -> list[Process]:
        """The present process of every worker's name."""
        named = {p.name: p for p in self.processes if p.role in ("prefill", "decode", "both")}
        return list(named.values())

    def running(self) -> list[Process]:
        """Workers that run: not dead, not frozen."""
        return [p for p in self.workers() if is_alive(p.pid) and not is_frozen(p.pid)]

    def quarantined(self) -> float:
        """Blocks in quarantine in all that run."""
        return sum(self.worker_metrics(p.name)["quarantined"] for p in self.running())

    def leftovers(self, routers: tuple[int, ...] = (), *, quarantine: bool = True) -> list[str]:
        """What running processes still hold; `quarantine` false: blocks there are not counted."""
        left = []
        for port in routers or (self.port,):
            for (name, labels), value in self.metrics(port).items():
                if value and name in _ROUTER_GAUGES:
                    worker = dict(labels).get("worker", "")
                    left.append(f"router {name.removeprefix('baton_')} {worker} {value:.0f}")
        for process in self.running():
            try:
                numbers = self.worker_metrics(process.name)
            except OSError as error:
                left.append(f"{process.name} does not answer: {error}")
                continue
            left += [
                f"{process.name} {what} {numbers[what]:.0f}"
                for what in ("used", "lent", "quarantined", "running", "waiting")
                if numbers[what] and (quarantine or what != "quarantined")
            ]
        return left


_ROUTER_GAUGES: Final = (
    "baton_inflight_choices",
    "baton_queued_choices",
    "baton_worker_reservations",
)


@contextlib.contextmanager
def ucx_over(transport: str) -> Iterator[None]:
    """Processes started inside of it let UCX use TCP alone, if `transport` asks for that."""
    before = os.environ.get("UCX_TLS")
    if transport == "nixl-tcp":
        os.environ["UCX_TLS"] = "tcp"
    try:
        yield
    finally:
        if transport == "nixl-tcp":
            os.environ.pop("UCX_TLS", None)
            if before is not None:
                os.environ["UCX_TLS"] = before

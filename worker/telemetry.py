"""What everybody hears from a worker: load reports, KV events, that it leaves.

A report goes out twice a second, soon after a change, and when a router has come. Its arrival is
what makes the worker live in a router's eyes, so it comes from the loop that also serves the jobs.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from protocol.bus import Bus
from protocol.codec import encode
from protocol.errors import BusError
from protocol.events import (
    EventEnvelope,
    KvEvent,
    KvEvents,
    KvSnapshot,
    Leaving,
    LoadReport,
    WorkerEvent,
)
from worker.engine.base import Load, Snapshot

_log = logging.getLogger("baton.worker")

REPORT_S: Final = 0.5
CHANGE_S: Final = 0.1


class Telemetry:
    """Publishes on one worker's event subject."""

    def __init__(
        self,
        *,
        bus: Bus,
        subject: str,
        worker: str,
        incarnation: str,
        load: Callable[[], Load],
        last_seq: Callable[[], Mapping[str, int]],
    ) -> None:
        self._bus = bus
        self._subject = subject
        self._worker = worker
        self._incarnation = incarnation
        self._load = load
        self._last_seq = last_seq
        self._last_kv_event = 0
        self._last_shape: tuple[int, int] = (-1, -1)
        self._change: asyncio.TimerHandle | None = None
        self._reported_at = float("-inf")
        self._closed = False
        self.draining = False

    async def run(self) -> None:
        """Report for ever."""
        while True:
            self.report()
            await asyncio.sleep(REPORT_S)

    def changed(self) -> None:
        """Something was queued, started or ended: report soon if the numbers moved."""
        if self._change is None and not self._closed:
            load = self._load()
            if (load.running, load.waiting) != self._last_shape:
                loop = asyncio.get_running_loop()
                self._change = loop.call_later(CHANGE_S, self.report)

    def asked(self) -> None:
        """Somebody waits for a report: now, but no more of them than changes may cause."""
        if self._change is None and not self._closed:
            loop = asyncio.get_running_loop()
            due = max(loop.time(), self._reported_at + CHANGE_S)
            self._change = loop.call_at(due, self.report)

    def report(self) -> None:
        if self._change is not None:
            self._change.cancel()
            self._change = None
        self._reported_at = asyncio.get_running_loop().time()
        load = self._load()
        self._last_shape = (load.running, load.waiting)
        self._publish(
            LoadReport(
                running=load.running,
                waiting=load.waiting,
                num_blocks=load.num_blocks,
                free_blocks=load.free_blocks,
                lent_blocks=load.lent_blocks,
                quarantined_blocks=load.quarantined_blocks,
                steps=load.steps,
                last_kv_event=self._last_kv_event,
                last_seq=dict(self._last_seq()),
                draining=self.draining,
            )
        )

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None:
        self._last_kv_event = first_id + len(events) - 1
        self._publish(KvEvents(first_id, list(events)))

    def leaving(self) -> None:
        self.draining = True
        self._publish(Leaving())

    def snapshot(self, snapshot: Snapshot) -> KvSnapshot:
        return KvSnapshot(
            self._worker, self._incarnation, snapshot.last_id, b"".join(snapshot.hashes)
        )

    def close(self) -> None:
        """No report is on its way any more."""
        self._closed = True
        if self._change is not None:
            self._change.cancel()
            self._change = None

    def _publish(self, event: WorkerEvent) -> None:
        envelope = EventEnvelope(self._worker, self._incarnation, [event])
        try:
            self._bus.publish(self._subject, encode(envelope))
        except BusError as error:
            _log.debug("report not sent: %s", error)

"""Jobs on their way to workers: an envelope for each worker and turn of the loop."""

import logging
from collections.abc import Callable
from typing import Final

from protocol.bus import Bus
from protocol.codec import encode
from protocol.jobs import Job, JobEnvelope
from protocol.mailbox import Mailer
from protocol.subjects import Subjects

_log = logging.getLogger("baton.router")

_MAX_ADDRESSES: Final = 4096


class JobMail:
    """One per router process. `on_lost`: hears how many jobs the bus did not take."""

    def __init__(
        self, bus: Bus, subjects: Subjects, router_id: str, on_lost: Callable[[int], None]
    ) -> None:
        self._subjects = subjects
        self._router_id = router_id
        self._on_lost = on_lost
        self._addresses: dict[tuple[str, str], tuple[str, str]] = {}
        self._mailer: Mailer[Job] = Mailer(
            bus, envelope=self._envelope, on_overflow=self._on_overflow
        )
        self.flush_now = self._mailer.flush_now

    def post(self, worker: str, incarnation: str, job: Job, *, lazy: bool = False) -> None:
        """`lazy`: with the next envelope to this worker, or a little later."""
        subject, reply = self._address(worker, incarnation)
        self._mailer.post(subject, job, reply=reply, lazy=lazy)

    def _address(self, worker: str, incarnation: str) -> tuple[str, str]:
        """Its subject, and where the bus says that nobody listens there: the same few, five times
        for each request."""
        found = self._addresses.get((worker, incarnation))
        if found is None:
            if len(self._addresses) >= _MAX_ADDRESSES:
                self._addresses.clear()
            found = (
                self._subjects.jobs(worker, incarnation),
                self._subjects.gone(self._router_id, worker, incarnation),
            )
            self._addresses[worker, incarnation] = found
        return found

    def _envelope(self, _subject: str, jobs: list[Job]) -> bytes:
        return encode(JobEnvelope(self._router_id, jobs))

    def _on_overflow(self, subject: str, jobs: list[Job]) -> None:
        """The bus took nothing: the deadlines of these jobs will move them elsewhere."""
        _log.warning("bus is full, dropped jobs=%d for %s", len(jobs), subject)
        self._on_lost(len(jobs))

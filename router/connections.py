"""Which HTTP connections of a router that leaves may be closed.

An idle connection is no proof that no request comes: it may be on the wire. So one that a client
might still use is kept for a grace, and a client that uses it is told to use another. Decides only;
`now` is an argument, and a connection is whatever stands for one.
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)


class Connections(Generic[C]):
    """Told of every request; asked only while draining."""

    def __init__(self) -> None:
        self._busy: set[C] = set()
        self._idle_since: dict[C, float] = {}
        self._drain_at: float | None = None

    def begin(self, connection: C) -> None:
        """A request of it is being answered."""
        self._busy.add(connection)

    def end(self, connection: C, now: float) -> None:
        self._busy.discard(connection)
        if self._drain_at is not None:
            self._idle_since[connection] = now

    def start_drain(self, now: float, open_ones: Iterable[C]) -> None:
        """Those that are open were idle before, nobody knows for how long: they count from now."""
        self._drain_at = now
        self._idle_since = dict.fromkeys(open_ones, now)

    def forsaken(self, open_ones: Iterable[C], now: float, grace_s: float) -> list[C]:
        """Of those that are open, the ones that were idle for `grace_s` of the draining, or since
        they came."""
        if self._drain_at is None:
            return []
        return [
            connection
            for connection in open_ones
            if connection not in self._busy
            and now - self._idle_since.setdefault(connection, now) >= grace_s
        ]

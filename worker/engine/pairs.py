"""Which transport each source's KV comes over, and why; and which ones failed with it lately.

One line is logged when a source is first pulled from and whenever transport or reason changes. A
transport that failed with a source is passed over for a while where another one will do; the mark
is of that incarnation and always ends by itself. Bounded: the sources used longest ago go first.
Knows no transport and no clock.
"""

import logging
from collections import OrderedDict
from typing import Final, NamedTuple

_log: Final = logging.getLogger("baton.transfer")

MAX_SOURCES: Final = 128
MARK_S: Final = 30.0


class Way(NamedTuple):
    """How a source's KV comes here."""

    transport: str
    reason: str


class Pairs:
    """The sources of one worker."""

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max = max_sources
        self._ways: OrderedDict[str, Way] = OrderedDict()
        self._marks: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    def used(self, source: str, way: Way) -> None:
        """A pull from the worker `source` starts."""
        if self._ways.get(source) != way:
            _log.info("kv from=%s transport=%s reason=%s", source, way.transport, way.reason)
            self._ways[source] = way
        self._ways.move_to_end(source)
        while len(self._ways) > self._max:
            self._ways.popitem(last=False)

    def failed(self, source: str, incarnation: str, transport: str, now: float) -> None:
        """Pass it over for `MARK_S` seconds."""
        mark = (source, incarnation, transport)
        self._marks[mark] = now + MARK_S
        self._marks.move_to_end(mark)
        while len(self._marks) > self._max:
            self._marks.popitem(last=False)

    def failing(self, source: str, incarnation: str, now: float) -> frozenset[str]:
        """The transports that failed with it lately."""
        while self._marks and next(iter(self._marks.values())) <= now:
            self._marks.popitem(last=False)
        if not self._marks:
            return frozenset()
        return frozenset(
            transport
            for worker, one, transport in self._marks
            if (worker, one) == (source, incarnation)
        )

    def ways(self) -> dict[str, Way]:
        """By source worker."""
        return dict(self._ways)

"""`Accepted` for the jobs whose answer is not immediate: one queue, one timer.

Knows keys and the loop, not what accepting means.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from protocol.ids import JobKey

ACCEPT_AFTER_S: Final = 0.1
"""`Accepted` is only worth a message if nothing better comes this soon."""
_SLACK_S: Final = 0.01


class LateAccepts:
    """Calls `accept` for each key a little later. Belongs to one event loop."""

    def __init__(self, accept: Callable[[JobKey], None]) -> None:
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._due: deque[tuple[float, JobKey]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: JobKey) -> None:
        self._due.append((self._loop.time() + ACCEPT_AFTER_S, key))
        if self._timer is None:
            self._timer = self._loop.call_later(ACCEPT_AFTER_S, self._on_timer)

    def close(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._due and self._due[0][0] <= now + _SLACK_S:
            self._accept(self._due.popleft()[1])
        if self._due:
            self._timer = self._loop.call_at(self._due[0][0], self._on_timer)

"""How late the loop is: whatever computes on it for long delays every stream of this router."""

import asyncio
from collections.abc import Callable
from typing import Final

LOOK_S: Final = 0.1


class LoopLag:
    """Wakes ten times a second and tells by how much it was late, in seconds."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = self._loop.time() + LOOK_S
        self._timer = self._loop.call_at(self._due, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._tell(max(0.0, self._loop.time() - self._due))
        self.start()

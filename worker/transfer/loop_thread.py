"""A thread that serves channels: calls from other threads, timers, deadlines, and its end.

What waits, and on what, is the subclass's (`reactor`: sockets; `ucx_loop`: endpoints of UCX).
Everything but `call`, `start` and `stop` belongs to the thread. Knows nothing of what is said.
"""

import heapq
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

_logger = logging.getLogger(__name__)

SWEEP_S: Final = 0.25
"""Deadlines are looked at this often: coarse, because they only catch silence."""


class Broken(Exception):
    """The peer broke the protocol or went away; the text goes to people and metrics."""

    def __init__(self, reason: str, *, peer_gone: bool = False) -> None:
        super().__init__(reason)
        self.peer_gone = peer_gone


class HasDeadline(Protocol):
    deadline: float | None
    """Monotonic seconds at which the channel is closed with a timeout; None: never."""


C = TypeVar("C", bound=HasDeadline)
V = TypeVar("V")


class LoopThread(Generic[C, V]):
    """`V` is what the subclass keeps of each channel."""

    def __init__(self, name: str) -> None:
        self._channels: dict[C, V] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._swept_at = 0.0
        self._stopping = False
        self._at_end: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    def at_end(self, function: Callable[[], None]) -> None:
        """Run it when all channels are closed."""
        self._at_end.append(function)

    def call(self, function: Callable[[], None]) -> bool:
        """Run it in the loop's thread; from any thread, never blocks. False after `stop`."""
        with self._lock:
            if self._stopping:
                return False
            wake = not self._calls
            self._calls.append(function)
        if wake:
            self._wake()
        return True

    def stop(self, wait_s: float) -> bool:
        """Close all channels and end the thread; False if it did not end in time."""
        with self._lock:
            self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout=wait_s)
        return not self._thread.is_alive()

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_ids), function))

    def close(self, channel: C, reason: str, *, peer_gone: bool = False) -> None:
        """Close it and tell it; repeats do nothing."""
        raise NotImplementedError

    def _run(self) -> None:
        """The thread's life."""
        raise NotImplementedError

    def _run_calls(self) -> bool:
        """True if there was one."""
        has_run = False
        while True:
            with self._lock:
                if not self._calls:
                    return has_run
                function = self._calls.popleft()
            has_run = True
            self._guard(function)

    def _run_timers(self) -> bool:
        """True if one was due."""
        has_run = False
        while self._timers and self._timers[0][0] <= time.monotonic():
            has_run = True
            self._guard(heapq.heappop(self._timers)[2])
        return has_run

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        for channel in list(self._channels):
            if channel.deadline is not None and channel.deadline <= now:
                self.close(channel, "timeout: the peer does not answer", peer_gone=True)

    def _guard(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            _logger.exception("a call in %s raised", self._thread.name)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass  # full: it wakes anyway; closed: it has ended

    def _drain_wake(self) -> None:
        try:
            while self._wake_read.recv(4096):
                pass
        except BlockingIOError:
            pass

"""One thread that serves many non-blocking sockets: a frozen peer costs a socket, not a thread.

Everything but `call` and `stop` belongs to the reactor's own thread. A channel that raises is
closed with the reason; the others never notice. Knows nothing of what is said on the sockets.
"""

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

_logger = logging.getLogger(__name__)

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
_SWEEP_S: Final = 0.25
"""Deadlines are looked at this often: coarse, because they only catch silence."""


class Broken(Exception):
    """The peer broke the protocol or went away; the text goes to people and metrics."""

    def __init__(self, reason: str, *, peer_gone: bool = False) -> None:
        super().__init__(reason)
        self.peer_gone = peer_gone


class Channel(Protocol):
    """One socket in a reactor."""

    sock: socket.socket
    deadline: float | None
    """Monotonic seconds at which `closed` is called with a timeout; None: never."""

    def ready(self) -> None:
        """The socket is readable or writable, as asked. Raises OSError or Broken to be closed."""

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        """The reactor has closed the socket: nothing is read into any buffer from now on."""


class Reactor:
    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._channels: dict[Channel, int] = {}
        """The events each waits for; 0 while it rests."""
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._swept_at = 0.0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, READ, None)
        self._stopping = False
        self._at_end: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def at_end(self, function: Callable[[], None]) -> None:
        """Run it as the last thing, when all channels are closed; said before `start`."""
        self._at_end.append(function)

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[[], None]) -> bool:
        """Run it in the reactor's thread; from any thread, never blocks. False after `stop`."""
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
        self._thread.join(timeout=wait_s)
        return not self._thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_ids), function))

    def add(self, channel: Channel, events: int) -> None:
        self._channels[channel] = 0
        self.watch(channel, events)

    def watch(self, channel: Channel, events: int) -> None:
        """Change what it waits for; 0: nothing. Does nothing for a closed channel."""
        before = self._channels.get(channel)
        if before is None or before == events:
            return
        self._channels[channel] = events
        if not before:
            self._selector.register(channel.sock, events, channel)
        elif not events:
            self._selector.unregister(channel.sock)
        else:
            self._selector.modify(channel.sock, events, channel)

    def close(self, channel: Channel, reason: str, *, peer_gone: bool = False) -> None:
        """Close its socket and tell it; repeats do nothing."""
        events = self._channels.pop(channel, None)
        if events is None:
            return
        if events:
            self._selector.unregister(channel.sock)
        channel.sock.close()
        self._guard(lambda: channel.closed(reason, peer_gone=peer_gone))

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._timeout()):
                if key.data is None:
                    self._drain_wake()
                elif key.data in self._channels:
                    self.try_now(key.data)
            self._run_calls()
            self._run_timers()
            self._sweep()
        self._run_calls()
        for channel in list(self._channels):
            self.close(channel, "stopped: the worker leaves")
        for function in self._at_end:
            self._guard(function)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def try_now(self, channel: Channel) -> None:
        """As if it had become ready."""
        try:
            channel.ready()
        except Broken as error:
            self.close(channel, str(error), peer_gone=error.peer_gone)
        except OSError as error:
            self.close(channel, f"closed: {error.strerror or error}", peer_gone=True)
        except Exception:
            _logger.exception("a transfer's socket raised")
            self.close(channel, "internal: the socket's handler raised")

    def _timeout(self) -> float | None:
        if self._calls:
            return 0.0
        timeout = _SWEEP_S if any(c.deadline is not None for c in self._channels) else None
        if self._timers:
            until = max(0.0, self._timers[0][0] - time.monotonic())
            return until if timeout is None else min(timeout, until)
        return timeout

    def _run_calls(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    return
                function = self._calls.popleft()
            self._guard(function)

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._guard(heapq.heappop(self._timers)[2])

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept_at < _SWEEP_S:
            return
        self._swept_at = now
        for channel in list(self._channels):
            if channel.deadline is not None and channel.deadline <= now:
                self.close(channel, "timeout: the peer does not answer", peer_gone=True)

    def _guard(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            _logger.exception("a transfer's reactor call raised")

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

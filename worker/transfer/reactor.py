"""One thread that serves many non-blocking sockets: a frozen peer costs a socket, not a thread.

A channel that raises is closed with the reason; the others never notice. Knows nothing of what is
said on the sockets.
"""

import logging
import selectors
import socket
import time
from typing import Final, Protocol

from worker.transfer.loop_thread import SWEEP_S, LoopThread
from worker.transfer.loop_thread import Broken as Broken

_logger = logging.getLogger(__name__)

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


class Channel(Protocol):
    """One socket in a reactor."""

    sock: socket.socket
    deadline: float | None
    """Monotonic seconds at which `closed` is called with a timeout; None: never."""

    def ready(self) -> None:
        """The socket is readable or writable, as asked. Raises OSError or Broken to be closed."""

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        """The reactor has closed the socket: nothing is read into any buffer from now on."""


class Reactor(LoopThread[Channel, int]):
    """Keeps of each channel the events it waits for; 0 while it rests."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, READ, None)

    def start(self) -> None:
        self._thread.start()

    def add(self, channel: Channel, events: int) -> None:
        """Raises Broken where the system refuses to watch it: it is closed then."""
        self._channels[channel] = 0
        try:
            self.watch(channel, events)
        except OSError as error:
            reason = f"closed: {error.strerror or error}"
            self.close(channel, reason)
            raise Broken(reason) from error

    def watch(self, channel: Channel, events: int) -> None:
        """Change what it waits for; 0: nothing. Does nothing for a closed channel. Raises OSError
        where the system refuses."""
        before = self._channels.get(channel)
        if before is None or before == events:
            return
        if not before:
            self._selector.register(channel.sock, events, channel)
        elif not events:
            self._selector.unregister(channel.sock)
        else:
            self._selector.modify(channel.sock, events, channel)
        self._channels[channel] = events

    def close(self, channel: Channel, reason: str, *, peer_gone: bool = False) -> None:
        """Close its socket and tell it; repeats do nothing."""
        events = self._channels.pop(channel, None)
        if events is None:
            return
        if events:
            try:
                self._selector.unregister(channel.sock)
            except (KeyError, ValueError):
                pass  # a `modify` that failed has forgotten it
        self._guard(channel.sock.close)
        self._guard(lambda: channel.closed(reason, peer_gone=peer_gone))

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            _logger.exception("%s raised: its transfers end", self._thread.name)
        finally:
            self._end()

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._timeout()):
                if key.data is None:
                    self._drain_wake()
                elif key.data in self._channels:
                    self.try_now(key.data)
            self._run_calls()
            self._run_timers()
            self._sweep()

    def _end(self) -> None:
        """Every channel is told, whatever happened."""
        with self._lock:
            self._stopping = True
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
        timeout = SWEEP_S if any(c.deadline is not None for c in self._channels) else None
        if self._timers:
            until = max(0.0, self._timers[0][0] - time.monotonic())
            return until if timeout is None else min(timeout, until)
        return timeout

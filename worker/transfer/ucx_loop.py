"""One thread that owns a UCX worker and serves its endpoints: it sleeps while nothing happens.

A channel that raises is closed with the reason; the others never notice. Knows nothing of what is
said on the endpoints.
"""

import logging
import select
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from protocol.errors import ConfigError
from worker.transfer.loop_thread import SWEEP_S, Broken, LoopThread
from worker.transfer.ucx_library import Library, Stream

_logger = logging.getLogger(__name__)

_TURNS: Final = 64
"""Steps of progress before the channels look at what has come: bounds what a flood can pile up."""
_NAP_S: Final = 1.0
"""The longest sleep: the library does not promise an event for everything."""


class UcxChannel(Protocol):
    """One endpoint in the loop."""

    stream: Stream
    deadline: float | None
    """Monotonic seconds at which `closed` is called with a timeout; None: never."""

    def advance(self) -> None:
        """Go on until something posted is not done yet. Raises Broken to be closed."""

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        """The endpoint is closed and all that was posted is terminal: nothing lands any more."""


class UcxLoop(LoopThread[UcxChannel, None]):
    """`device` is the only network device used, "" for all. What is said `at_end` runs before the
    library goes."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name)
        self._device = device
        self._closing: list[tuple[UcxChannel, str, bool]] = []
        self._again = False
        self._opened = threading.Event()
        self._failure: ConfigError | None = None
        self._library: Library | None = None

    @property
    def library(self) -> Library:
        assert self._library is not None, "the loop has not started"
        return self._library

    def start(self, first: Callable[[], None]) -> None:
        """Load the library, then run `first`, in the thread; waits for both. Raises ConfigError,
        which `first` may raise too."""
        self._calls.append(lambda: self._first(first))
        self._thread.start()
        self._opened.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def add(self, channel: UcxChannel) -> None:
        self._channels[channel] = None
        self._again = True

    def poke(self) -> None:
        """Something was posted or has become possible: look at the channels once more."""
        self._again = True

    def close(self, channel: UcxChannel, reason: str, *, peer_gone: bool = False) -> None:
        """Close its endpoint; it is told once nothing can land. Repeats do nothing."""
        if channel not in self._channels:
            return
        del self._channels[channel]
        self._again = True
        self._guard(channel.stream.close)
        self._closing.append((channel, reason, peer_gone))

    def _first(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001  whatever it is, `start` says so
            self._give_up(error)
        finally:
            self._opened.set()

    def _give_up(self, error: Exception) -> None:
        """Before the start is over."""
        if isinstance(error, ConfigError):
            self._failure = error
        else:
            self._failure = ConfigError(f"ucx does not start: {error!r}")
            self._failure.__cause__ = error
        with self._lock:
            self._stopping = True

    def _run(self) -> None:
        try:
            self._library = Library(self._device)
            self._serve(self._library)
        except Exception as error:
            if self._opened.is_set():
                _logger.exception("the ucx thread raised: its transfers end")
            else:
                self._give_up(error)
        finally:
            self._opened.set()  # who starts it joins the thread where that failed
            try:
                if self._library is not None:
                    self._end(self._library)
            finally:
                self._wake_read.close()
                self._wake_write.close()

    def _serve(self, library: Library) -> None:
        worker = library.worker
        poll = select.poll()
        poll.register(worker.epoll_file_descriptor, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while not self._stopping:
            self._again = self._progress(library)
            self._again |= self._run_calls()
            for channel in list(self._channels):
                self._try(channel)
            self._tell_closed()
            self._again |= self._run_timers()
            self._sweep()
            if not self._again and worker.arm():
                poll.poll(self._timeout_s() * 1000)
                self._drain_wake()

    def _end(self, library: Library) -> None:
        """Every channel is told, whatever happened."""
        with self._lock:
            self._stopping = True
        self._run_calls()
        for channel in list(self._channels):
            self.close(channel, "stopped: the worker leaves")
        is_quiet = False
        try:
            self._tell_closed()
            while self._closing and self._progress(library):
                self._tell_closed()
            is_quiet = not self._closing
        except Exception:
            _logger.exception("ucx makes no progress: what is under way is given up")
        for function in self._at_end:
            self._guard(function)
        if is_quiet:  # else the memory must stay: the library is left as it is
            self._library = None

    def _progress(self, library: Library) -> bool:
        for turn in range(_TURNS):
            if not library.worker.progress_once():
                return turn > 0
        return True

    def _try(self, channel: UcxChannel) -> None:
        if channel not in self._channels:
            return
        try:
            channel.advance()
        except Broken as error:
            self.close(channel, str(error), peer_gone=error.peer_gone)
        except Exception:
            _logger.exception("a transfer's endpoint raised")
            self.close(channel, "internal: the endpoint's handler raised")

    def _tell_closed(self) -> None:
        waiting, self._closing = self._closing, []
        for channel, reason, peer_gone in waiting:
            if channel.stream.is_quiet():
                self._tell(channel, reason, peer_gone)
            else:
                self._closing.append((channel, reason, peer_gone))

    def _tell(self, channel: UcxChannel, reason: str, peer_gone: bool) -> None:
        self._guard(lambda: channel.closed(reason, peer_gone=peer_gone))

    def _timeout_s(self) -> float:
        if self._calls:
            return 0.0
        has_deadline = any(c.deadline is not None for c in self._channels) or self._closing
        timeout_s = SWEEP_S if has_deadline else _NAP_S
        if self._timers:
            timeout_s = min(timeout_s, max(0.0, self._timers[0][0] - time.monotonic()))
        return timeout_s

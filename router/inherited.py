"""What a router gets from its parent, if it has one: the listening sockets, and a line to it.

The line is a socket pair. The router says on it that it is ready, and how long it may take to drain
when its time has come; the parent says that others serve in its place; that it closes says that the
other side is gone. Knows no HTTP and no bus.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final, Self

from protocol.errors import ConfigError

FAMILY_DIR: Final = "_BATON_FAMILY_DIR"
"""In the environment: where the routers of one parent find each other. Not a flag: children of
another version might not know it."""
_READY: Final = b"r"
RELIEVED: Final = b"l"


def ready(drain_timeout_ms: int) -> bytes:
    """What a router says when it serves. The time is its own: its settings may be newer than the
    parent's."""
    return _READY + b"%d\n" % drain_timeout_ms


def is_ready(said: bytes) -> bool:
    return _READY in said


def drain_timeout_of(said: bytes) -> int | None:
    """Milliseconds; None if it did not say, as routers of 0.1 do not."""
    number, end, _ = said.partition(_READY)[2].partition(b"\n")
    return int(number) if end and number.isdigit() else None


class Inherited:
    """The child's end."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        line: socket.socket,
        *,
        is_successor: bool,
        folder: str = "",
    ) -> None:
        """`folder`: where the routers of this parent find each other."""
        self.folder = folder
        self.listeners = tuple(listeners)
        self.is_successor = is_successor
        """Others serve already: take part only when as able as they are."""
        self._is_orphan = False
        self._line = line
        self._is_relieved = False
        self._on_orphaned: Callable[[], None] = lambda: None
        line.setblocking(False)

    @classmethod
    def of(cls, listen_fds: str, line_fd: str, *, is_successor: bool, folder: str = "") -> Self:
        """From the flags that the parent gives. Raises ConfigError."""
        try:
            listeners = [socket.socket(fileno=int(text)) for text in listen_fds.split(",")]
            line = socket.socket(fileno=int(line_fd))
        except (OSError, ValueError) as error:
            raise ConfigError(f"not started by `baton router --processes`: {error}") from None
        for inherited in (*listeners, line):
            inherited.set_inheritable(False)
        return cls(listeners, line, is_successor=is_successor, folder=folder)

    def watch(self, on_orphaned: Callable[[], None]) -> None:
        """Call `on_orphaned` when the parent is gone. Needs a running loop."""
        self._on_orphaned = on_orphaned
        asyncio.get_running_loop().add_reader(self._line, self._read)

    def say_ready(self, drain_timeout_ms: int) -> None:
        with contextlib.suppress(OSError):  # it is gone: the reader says so
            self._line.send(ready(drain_timeout_ms))

    def is_relieved(self) -> bool:
        """Others accept on our sockets. Said before the signal, so it is known when that comes."""
        self._read()
        return self._is_relieved

    def _read(self) -> None:
        try:
            data = self._line.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._is_relieved |= RELIEVED in data
        if not data and not self._is_orphan:
            self._is_orphan = True
            asyncio.get_running_loop().remove_reader(self._line)
            self._on_orphaned()

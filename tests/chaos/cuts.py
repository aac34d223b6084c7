"""Ways between processes that a test can cut: a proxy before NATS, an address of our own.

The proxy lives in threads, so that rows may block. It carries bytes and knows no protocol.
"""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Final

from baton.local_servers import free_port

_PIECE: Final = 65_536
PEER_ADDRESS: Final = "10.99.99.1"


class Proxy:
    """127.0.0.1:`port` to `target_port`, until `cut`, `swallow` or `close`."""

    def __init__(self, target_port: int, *, bytes_per_s: float = 0.0) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._pace = bytes_per_s
        self._passes = threading.Event()
        self._passes.set()
        self._refuses = False
        self._closed = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Open connections break, new ones are ended at once."""
        self._refuses = True
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """Connections stay, and nothing passes."""
        self._passes.clear()

    def mend(self) -> None:
        self._refuses = False
        self._passes.set()

    def close(self) -> None:
        self._closed = True
        self._passes.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refuses:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port), 2.0)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        piece = min(_PIECE, int(self._pace / 10)) if self._pace else _PIECE
        try:
            while data := source.recv(piece):
                self._passes.wait()
                if self._refuses:
                    break
                if self._pace:
                    time.sleep(len(data) / self._pace)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                self._open.discard(end)
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def _address(verb: str) -> str:
    """What `ip` complained about; empty if it did as it was told."""
    command = ["ip", "addr", verb, f"{PEER_ADDRESS}/32", "dev", "lo"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


@contextlib.contextmanager
def own_address() -> Iterator[str]:
    """An address of this machine that `take_away` can take. Yields what is wrong, if it cannot."""
    wrong = _address("add")
    try:
        yield wrong
    finally:
        if not wrong:
            _address("del")


def take_away() -> str:
    """From now on nobody reaches who listens there."""
    return _address("del")


def give_back() -> str:
    return _address("add")

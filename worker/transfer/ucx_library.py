"""UCXX, loaded only when the transport starts: its import takes a second and leaves traces.

What the import changes in our environment is taken back (children and other libraries' UCX would
inherit it), and what UCX prints goes to stderr. Only this file knows the library's names.

UCX's *stream* calls are used, on purpose. A stream is ordered both ways, and all copies into a
receiver's memory are made by the thread that runs the worker's progress, never by a device: so a
receive that was ended by closing the endpoint in that thread can write nothing any more. Tagged
messages can be matched by anybody who knows the tag, and large ones are fetched by the network card
behind the program's back.
"""

import contextlib
import importlib.util
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from protocol.errors import ConfigError
from worker.transfer.reactor import Broken

_QUIET: Final = {"UCX_LOG_FILE": "stderr", "UCXX_LOG_LEVEL": "FATAL"}
"""Set for the import, unless the operator says something else: every dead peer would be logged."""
_OK: Final = 0
_CANCELED: Final = -16
_NO_CONNECTION: Final = ("NotConnected", "Unreachable", "Rejected", "TimedOut")


def ucx_unavailable() -> str:
    """Why this process cannot run `ucx`; empty if it can. Imports nothing."""
    if sys.platform != "linux":
        return "needs Linux"
    if importlib.util.find_spec("ucxx") is None:
        return "ucxx is not installed (extra ucx)"
    return ""


class Library:
    """One UCX context and worker. Belongs to the thread that makes it.

    `device` is the only network device used, "" for all. Raises ConfigError.
    """

    def __init__(self, device: str) -> None:
        with _own_environment(_QUIET):
            self._core, self._array = _load()
            self._open(device)

    def _open(self, device: str) -> None:
        self.error: type[Exception] = self._core.UCXError
        options = {"TCP_CM_REUSEADDR": "y"}  # a worker that comes back takes its port again
        if device:
            options["NET_DEVICES"] = device
        features = (self._core.Feature.STREAM, self._core.Feature.WAKEUP)
        try:
            self._context = self._core.UCXContext(options, features)
            self.worker = self._core.UCXWorker(self._context, False, False)
            self.worker.init_blocking_progress_mode()
        except self.error as error:
            raise ConfigError(f"ucx does not start: {error}") from error

    def listen(self, port: int, on_knock: Any) -> Any:
        """`on_knock(request)` is called, while the worker makes progress, for each that connects.
        Raises the library's error."""
        return self._core.UCXListener.create(self.worker, port, on_knock)

    def connect(self, host: str, port: int) -> "Stream":
        """Raises Broken where it fails at once."""
        try:
            return Stream(self.worker.create_endpoint_from_hostname(host, port, True), self)
        except self.error as error:
            raise Broken(f"connect: {error}", peer_gone=True) from error

    def accept(self, listener: Any, request: int) -> "Stream":
        """Raises Broken if it has gone away already."""
        try:
            return Stream(listener.create_endpoint_from_conn_request(request, True), self)
        except self.error as error:
            raise Broken(f"accept: {error}", peer_gone=True) from error

    def wrap(self, buffer: Any) -> Any:
        return self._array(buffer)


class Posted:
    """A send or receive, and the memory it works on: kept until it is terminal."""

    def __init__(self, request: Any, buffer: Any, stream: "Stream") -> None:
        self.buffer = buffer
        self._request = request
        self._stream = stream

    @property
    def num_bytes(self) -> int:
        return len(self.buffer)

    def is_terminal(self) -> bool:
        return bool(self._request.completed)

    def is_done(self) -> bool:
        """Raises Broken if it failed."""
        if not self._request.completed:
            return False
        if self._request.status != _OK:
            if self._request.status == _CANCELED and self._stream.is_alive:
                # Seen where other endpoints of this worker are closed at that moment (UCX 1.21):
                # neither we nor the peer ended this one.
                raise Broken("cancelled: by the library", peer_gone=True)
            raise self._stream.broken()
        return True


class Stream:
    """One endpoint. Sends and receives are each done in their order."""

    def __init__(self, endpoint: Any, library: Library) -> None:
        self._endpoint = endpoint
        self._library = library
        self._sends: deque[Posted] = deque()
        self._receives: deque[Posted] = deque()

    def send(self, buffer: Any) -> Posted:
        """The library may read `buffer` until the send is terminal. Raises Broken."""
        return self._post(self._endpoint.stream_send, buffer, self._sends)

    def receive(self, buffer: Any) -> Posted:
        """Fill all of `buffer`. Raises Broken."""
        return self._post(self._endpoint.stream_recv, buffer, self._receives)

    def close(self) -> None:
        """Give up what is posted, at once: nothing is flushed, nobody is waited for."""
        self._endpoint.close_blocking()

    @property
    def is_alive(self) -> bool:
        """Neither closed by us nor failed."""
        return bool(self._endpoint.alive)

    @property
    def num_unsent(self) -> int:
        """Sends that are not terminal."""
        _forget(self._sends)
        return len(self._sends)

    def is_quiet(self) -> bool:
        """Nothing posted can touch memory any more."""
        _forget(self._receives)
        return not self.num_unsent and not self._receives

    def broken(self) -> Broken:
        """Why the endpoint does not work; a failed request's own status says less."""
        try:
            self._endpoint.raise_on_error()
        except self._library.error as error:
            kind = type(error).__name__
            text = str(error).rpartition("error: ")[2]
            where = "connect" if any(name in kind for name in _NO_CONNECTION) else "closed"
            return Broken(f"{where}: {text}", peer_gone=True)
        return Broken("closed: the endpoint failed", peer_gone=True)

    def _post(self, call: Any, buffer: Any, posted: deque[Posted]) -> Posted:
        _forget(posted)
        if not self.is_alive:
            raise self.broken()  # a send on a failed endpoint would never return (UCX 1.21)
        try:
            operation = Posted(call(self._library.wrap(buffer)), buffer, self)
        except self._library.error as error:
            raise self.broken() from error
        posted.append(operation)
        return operation


def _forget(posted: deque[Posted]) -> None:
    while posted and posted[0].is_terminal():
        posted.popleft()


def _load() -> tuple[Any, Any]:
    """The library's calls and its buffer class. Raises ConfigError."""
    try:
        with _own_environment({}):
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"ucx cannot be loaded: {error}") from error
    return libucxx, Array


@contextlib.contextmanager
def _own_environment(settings: dict[str, str]) -> Iterator[None]:
    """UCX is told these, where the operator says nothing; what is told within is gone after."""
    before = {name for name in os.environ if name.startswith("UCX")}
    os.environ.update({name: value for name, value in settings.items() if name not in before})
    try:
        yield
    finally:
        for name in [n for n in os.environ if n.startswith("UCX") and n not in before]:
            del os.environ[name]

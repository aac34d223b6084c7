"""UCXX, loaded only when the transport starts: its import takes a second and leaves traces.

What the import changes in our environment is taken back (children and other libraries' UCX would
inherit it), and what UCX prints goes to stderr. Only this file knows the library's names.

UCX's *stream* calls are used, on purpose. A stream is ordered both ways, and all copies into a
receiver's memory are made by the thread that runs the worker's progress, never by a device: so a
receive that was ended by closing the endpoint in that thread can write nothing any more. Tagged
messages can be matched by anybody who knows the tag, and large ones are fetched by the network card
behind the program's back.

A receive whose data is all here when it is posted, in several pieces, is done at once. UCX (up to
1.22) then takes for its status whatever the recycled memory of the request says: how an earlier
request ended (`_LEFT_OVER`), or what was in memory that no request has used (`_Pool`). See
`docs/adr/0011-ucx.md`.
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
_LEFT_OVER: Final = (-6, -16, -20, -23, -24, -25, -80)
"""How requests of closed or failed endpoints end: unreachable, cancelled, timed out, rejected, not
connected, reset, endpoint timeout. UCX ends no receive with these in the call that posts it: as the
status of one that was done at once they are another's, and the data is here."""
_FIRST_REQUESTS: Final = 4096
_SPARE_REQUESTS: Final = 256
"""For what UCX asks of itself: to connect, to flush, to close."""
_MAX_TURNS: Final = 1_000_000
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
            self.requests = _Pool(self)
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


class _Pool:
    """UCX's request objects: none of ours is one that was never used. What it takes for its status
    there may be a byte of somebody else's memory; a positive one looks like a receive that never
    ends, and closing its endpoint is a segmentation fault."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.num_used = 0
        self.num_posted = 0
        self._use(_FIRST_REQUESTS)

    def prepare(self) -> None:
        """One is about to be posted. Raises the library's error."""
        if self.num_posted + _SPARE_REQUESTS >= self.num_used:
            self._use(2 * self.num_used)

    def _use(self, num_requests: int) -> None:
        """Have so many in use at once, the posted ones included, all of which end well: UCX takes
        what was used last before it takes what was never used."""
        library, worker = self._library, self._library.worker
        count = num_requests - self.num_posted
        endpoint = worker.create_endpoint_from_worker_address(worker.address, True)
        memory = memoryview(bytearray(count))
        receives = [endpoint.stream_recv(library.wrap(memory[n : n + 1])) for n in range(count)]
        sent = endpoint.stream_send(library.wrap(bytes(count)))
        turns = 0
        while not (sent.completed and receives[-1].completed) and turns < _MAX_TURNS:
            worker.progress_once()
            turns += 1
        endpoint.close_blocking()
        if not (sent.completed and receives[-1].completed):
            raise library.error("no way from this process to itself")
        self.num_used = num_requests


class Posted:
    """A send or receive, and the memory it works on: kept until it is terminal."""

    def __init__(self, request: Any, buffer: Any, stream: "Stream", *, is_receive: bool) -> None:
        self.buffer = buffer
        self._request = request
        self._stream = stream
        # Its data was here before: see `_LEFT_OVER`.
        self._is_filled = is_receive and request.completed and request.status in _LEFT_OVER

    @property
    def num_bytes(self) -> int:
        return len(self.buffer)

    def is_terminal(self) -> bool:
        return bool(self._request.completed)

    def is_done(self) -> bool:
        """Raises Broken if it failed."""
        if not self._request.completed:
            return False
        if self._request.status != _OK and not self._is_filled:
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
        self._forget(self._sends)
        return len(self._sends)

    def is_quiet(self) -> bool:
        """Nothing posted can touch memory any more."""
        self._forget(self._receives)
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
        self._forget(posted)
        if not self.is_alive:
            raise self.broken()  # a send on a failed endpoint would never return (UCX 1.21)
        try:
            self._library.requests.prepare()
            request = call(self._library.wrap(buffer))
        except self._library.error as error:
            raise self.broken() from error
        self._library.requests.num_posted += 1
        operation = Posted(request, buffer, self, is_receive=posted is self._receives)
        posted.append(operation)
        return operation

    def _forget(self, posted: deque[Posted]) -> None:
        while posted and posted[0].is_terminal():
            posted.popleft()
            self._library.requests.num_posted -= 1


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

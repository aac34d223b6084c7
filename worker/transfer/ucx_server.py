"""The source's side of `ucx`: sends lent blocks to readers that know the lease's nonce.

When may the word be read? UCX may send a block straight from the arena's memory, and later than
`send` returned: it keeps a reference until the send is terminal, and not a moment longer (that is
what terminal means: the caller may write the memory again). So the word is read only after every
send of the reply's blocks is terminal. Whatever bytes left this process were then read from the
arena before the word was; the word is zeroed before a block of an ended lease is written; so bytes
of a later owner imply a zero word, however slowly they were sent. The word itself travels as a copy
of our own, behind the data, on an endpoint that keeps order.

What a peer sends and nobody has posted a receive for, UCX keeps for ever. So there is always one:
the next request's header is posted before a reply goes, and is looked at in every turn. While data
is owed, a next request is a reason to close; nothing but data is ever waited for.
"""

import time
from array import array
from collections import deque
from collections.abc import Generator
from typing import Any, Final, Protocol

from protocol.errors import ConfigError
from worker.kv.arena import Arena, LeaseTable
from worker.transfer.operations import out_of_range, runs
from worker.transfer.reactor import Broken
from worker.transfer.tcp_server import ServerLimits, ServerStats
from worker.transfer.tcp_wire import (
    ID_BYTES,
    REQUEST_BYTES,
    WORD,
    Request,
    Status,
    decode_request,
    encode_reply,
)
from worker.transfer.ucx_library import Posted, Stream
from worker.transfer.ucx_listener import drop_silent, keep_local
from worker.transfer.ucx_loop import UcxLoop

_REQUEST_TIMEOUT_S: Final = 10.0
"""For the first request of a connection, and for the rest of one whose header is here."""
_RUN_BYTES: Final = 1 << 20
_WINDOW_BYTES: Final = 4 << 20
_WINDOW: Final = 64
"""Sends posted ahead."""
_MAX_UNSENT: Final = 16
"""A peer that asks on but takes no answer is closed."""
_SETTLED_S: Final = 0.1
"""Idle for less, a request may be on its way."""
_PAUSE_S: Final = 0.05
_MAX_KNOCKING: Final = 64
"""Who has connected and waits for room; the next are turned away."""
_SKIP_BYTES: Final = 1 << 16
_SILENT_S: Final = 5.0
"""A client that has said nothing is dropped after one to two of these."""
_THROTTLE_S: Final = 0.05


class _Awaited(Protocol):
    def is_done(self) -> bool: ...


_Script = Generator[_Awaited, None, None]


class _Pause:
    def __init__(self, seconds: float, loop: UcxLoop) -> None:
        self._until = time.monotonic() + seconds
        loop.later(seconds, loop.poke)

    def is_done(self) -> bool:
        return time.monotonic() >= self._until


class UcxListener:
    """Accepts readers, as many as there is room for."""

    def __init__(
        self, loop: UcxLoop, arena: Arena, leases: LeaseTable, limits: ServerLimits
    ) -> None:
        self.loop = loop
        self.arena = arena
        self.leases = leases
        self.limits = limits
        self.stats = ServerStats()
        self.port = 0
        self._listener: Any = None
        self._knocking: deque[int] = deque()
        self._connections: dict[UcxServerConnection, None] = {}
        self._silent: set[tuple[str, int]] = set()
        self._is_admitting = False

    def begin(self, port: int, *, only_local: bool) -> str:
        """In the loop's thread. A warning, or "". Raises ConfigError."""
        library = self.loop.library
        try:
            self._listener = library.listen(port, self._knock)
        except library.error as error:
            hint = "; is another worker running?" if "Busy" in type(error).__name__ else ""
            raise ConfigError(f"cannot serve KV over ucx on port {port}: {error}{hint}") from error
        self.port = self._listener.port
        self.loop.at_end(self._end)
        self.loop.later(_SILENT_S, self._drop_silent)
        if only_local and not keep_local(self.port):
            return f"port {self.port} of ucx is open on every interface"
        return ""

    def forget(self, connection: "UcxServerConnection") -> None:
        self._connections.pop(connection, None)
        self._admit_soon()

    def _knock(self, request: int, *_: object) -> None:
        """Called by the library in the middle of its progress: only notes it."""
        self._knocking.append(request)
        self._admit_soon()

    def _admit_soon(self, delay_s: float = 0.0) -> None:
        if self._knocking and not self._is_admitting:
            self._is_admitting = True
            self.loop.later(delay_s, self._admit)

    def _admit(self) -> None:
        self._is_admitting = False
        while self._knocking and len(self._connections) < self.limits.max_connections:
            self._accept(self._knocking.popleft())
        while len(self._knocking) > _MAX_KNOCKING:
            self._turn_away(self._knocking.pop())
        if self._knocking:
            self._evict()
            self._admit_soon(_PAUSE_S)

    def _accept(self, request: int) -> None:
        try:
            stream = self.loop.library.accept(self._listener, request)
        except Broken:
            return
        try:
            connection = UcxServerConnection(stream, self)
        except Exception as error:
            stream.close()  # nobody else knows it yet
            if not isinstance(error, Broken):
                raise
            return
        self.stats.count("connections")
        self._connections[connection] = None
        self.loop.add(connection)

    def _turn_away(self, request: int) -> None:
        try:
            self.loop.library.accept(self._listener, request).close()
        except Broken:
            pass

    def _evict(self) -> None:
        """Close the connection that has been idle longest, if one is idle."""
        before = time.monotonic() - _SETTLED_S
        idle = [(c.settled_since or before, c) for c in self._connections]
        since, connection = min(idle, key=lambda entry: entry[0])
        if since < before:
            self.stats.count("evicted")
            self.loop.close(connection, "evicted: room for others")

    def _drop_silent(self) -> None:
        self.loop.later(_SILENT_S, self._drop_silent)  # first: without a descriptor left it raises
        self._silent = drop_silent(self.port, self._silent)

    def _end(self) -> None:
        while self._knocking:
            self._turn_away(self._knocking.popleft())
        self._listener = None


class UcxServerConnection:
    """One reader: header, block numbers, reply, and again."""

    def __init__(self, stream: Stream, listener: UcxListener) -> None:
        self.stream = stream
        self.deadline: float | None = time.monotonic() + _REQUEST_TIMEOUT_S
        self.idle_since: float | None = time.monotonic()
        """None while an authenticated request is read or answered."""
        self._listener = listener
        self._limits = listener.limits
        self._arena = listener.arena
        self._leases = listener.leases
        self._header = self._next_header()
        self._owes_data = False
        self._script = self._serve()
        self._waits_for: _Awaited = self._header

    @property
    def settled_since(self) -> float | None:
        """Idle for so long, and nothing on its way to the reader."""
        return None if self.stream.num_unsent else self.idle_since

    def advance(self) -> None:
        while True:
            if self._owes_data and self._header.is_done():
                raise Broken("protocol: a request before the reply's end")
            if not self._waits_for.is_done():
                return
            self._waits_for = next(self._script)

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self._script.close()
        self._listener.forget(self)
        if reason.startswith("protocol"):
            self._listener.stats.count("rubbish")

    def _next_header(self) -> Posted:
        return self.stream.receive(bytearray(REQUEST_BYTES))

    def _serve(self) -> _Script:
        while True:
            yield self._header
            request = decode_request(self._header.buffer)
            if request.num_blocks > self._arena.num_blocks:
                raise Broken("protocol: more blocks than there are")
            self.deadline = time.monotonic() + _REQUEST_TIMEOUT_S
            if self._is_lent(request):
                self.idle_since = None
                yield from self._answer(request)
            else:
                # Its list is read and dropped, so that the next request is found behind it.
                yield from self._skip(request.num_blocks * ID_BYTES)
                self._header = self._next_header()
                self._refuse(Status.LEASE_LOST)
            self.idle_since = time.monotonic()
            self.deadline = self.idle_since + self._limits.idle_timeout_s

    def _skip(self, num_bytes: int) -> _Script:
        while num_bytes:
            part = self.stream.receive(bytearray(min(num_bytes, _SKIP_BYTES)))
            yield part
            num_bytes -= part.num_bytes

    def _is_lent(self, request: Request) -> bool:
        known = request.nonce != 0 and request.slot < self._leases.num_slots
        return known and self._leases.read(request.slot) == request.nonce

    def _answer(self, request: Request) -> _Script:
        blocks = array("I")
        if request.num_blocks:
            numbers = self.stream.receive(bytearray(request.num_blocks * ID_BYTES))
            yield numbers
            blocks.frombytes(numbers.buffer)
        self._header = self._next_header()
        if not self._is_lent(request):
            self._refuse(Status.LEASE_LOST)
            return
        size = self._arena.block_bytes
        wrong_size = request.num_blocks > 0 and request.block_bytes != size
        if wrong_size or out_of_range(blocks, self._arena.num_blocks):
            self._refuse(Status.WRONG_BLOCKS)
            return
        self._listener.stats.count("served")
        self._reply(Status.OK, request.num_blocks * size)
        self._owes_data = True
        yield from self._send_blocks(blocks)
        self._owes_data = False
        # Every send of a block is terminal: from here on nothing reads the arena for this reply.
        word = request.nonce if self._is_lent(request) else 0
        self.stream.send(WORD.pack(word))

    def _refuse(self, status: Status) -> None:
        self._listener.stats.count("refused")
        self._reply(status, 0)

    def _reply(self, status: Status, num_bytes: int) -> None:
        if self.stream.num_unsent > _MAX_UNSENT:
            raise Broken("protocol: the reader takes no answers")
        self.deadline = time.monotonic() + self._limits.idle_timeout_s
        self.stream.send(encode_reply(status, num_bytes))

    def _send_blocks(self, blocks: "array[int]") -> _Script:
        """Ends when all of it is sent and none of it is referred to."""
        size = self._arena.block_bytes
        throttle = self._limits.throttle_bytes_per_s
        most = min(_RUN_BYTES, throttle * _THROTTLE_S) if throttle else _RUN_BYTES
        posted: deque[Posted] = deque()
        ahead = 0
        for start, _, count in runs(blocks, blocks, max(1, int(most // size))):
            posted.append(
                self.stream.send(self._arena.memory[start * size : (start + count) * size])
            )
            ahead += posted[-1].num_bytes
            while posted and (throttle or ahead > _WINDOW_BYTES or len(posted) >= _WINDOW):
                yield posted[0]
                ahead -= posted.popleft().num_bytes
                self.deadline = time.monotonic() + self._limits.idle_timeout_s
            if throttle:
                yield _Pause(count * size / throttle, self._listener.loop)
        for part in posted:
            yield part
            self.deadline = time.monotonic() + self._limits.idle_timeout_s

"""The source's side of `tcp`: sends lent blocks to readers that know the lease's nonce.

The lease is checked before a byte is copied, and its word is read only after the last data byte
was handed to the kernel (which copies), and sent last. The arena's memory is never given to
anything that keeps a reference to it.
"""

import socket
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from worker.kv.arena import Arena, LeaseTable
from worker.transfer.operations import out_of_range, runs
from worker.transfer.reactor import READ, WRITE, Broken, Reactor
from worker.transfer.tcp_wire import (
    ID_BYTES,
    MAX_PARTS,
    REQUEST_BYTES,
    WORD,
    Request,
    Status,
    decode_request,
    encode_reply,
    prepare,
    receive_some,
    send_some,
)

_REQUEST_TIMEOUT_S: Final = 10.0
"""From the first byte of a request (or the connection's begin) to its last."""
_SEND_BYTES: Final = 1 << 20
_TURNS: Final = 4
"""System calls in a row for one connection."""
_SETTLED_S: Final = 0.1
"""Idle for less, a request may be on its way."""
_PAUSE_S: Final = 0.05
_SKIP_BYTES: Final = 1 << 16


@dataclass(slots=True)
class ServerStats:
    """What happened at the listening side since the start."""

    connections: int = 0
    served: int = 0
    refused: int = 0
    """Requests under no living lease, or for blocks that are not there."""
    rubbish: int = 0
    """Connections closed because they spoke something else."""
    evicted: int = 0
    """Idle connections closed to make room."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, name: str) -> None:
        """From any reactor's thread."""
        with self.lock:
            setattr(self, name, getattr(self, name) + 1)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    max_connections: int = 256
    idle_timeout_s: float = 60.0
    """Between requests, and without any progress within a reply."""
    throttle_bytes_per_s: float | None = None


class TcpListener:
    """Accepts in one reactor, the first, and deals connections out to all that live."""

    def __init__(
        self,
        sock: socket.socket,
        reactors: list[Reactor],
        arena: Arena,
        leases: LeaseTable,
        limits: ServerLimits,
    ) -> None:
        self.sock = sock
        self.deadline: float | None = None
        self.stats = ServerStats()
        self.limits = limits
        self.arena = arena
        self.leases = leases
        self.home = reactors[0]
        self._reactors = reactors
        # Any reactor's thread may take one out, even while another dies: no step of ours minds.
        self._connections: dict[ServerConnection, None] = {}
        self._next = 0

    def begin(self) -> None:
        """In the home's thread."""
        self.home.add(self, READ)

    def move(self, sock: socket.socket, home: Reactor) -> None:
        """The home has died, and with it the socket: listen on this one, there."""
        self.sock, self.home = sock, home
        if not home.call(self.begin):
            sock.close()

    def ready(self) -> None:
        if len(self._connections) >= self.limits.max_connections:
            self._evict()
            self._pause()
            return
        try:
            sock, _ = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._pause()  # no descriptor left
            return
        try:
            prepare(sock)
        except OSError:
            sock.close()  # reset before we looked at it
            return
        living = [r for r in self._reactors if not r.is_stopping] or [self.home]
        reactor = living[self._next % len(living)]
        self._next += 1
        self.stats.count("connections")
        connection = ServerConnection(sock, reactor, self)
        self._connections[connection] = None
        if not reactor.call(lambda: reactor.add(connection, READ)):
            self.forget(connection)
            sock.close()

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        """Nothing to tell: the sockets that it accepted are channels of their own."""

    def forget(self, connection: "ServerConnection") -> None:
        """From any reactor's thread."""
        self._connections.pop(connection, None)

    def _pause(self) -> None:
        """Whoever comes now waits in the kernel's backlog."""
        self.home.watch(self, 0)
        self.home.later(_PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        try:
            self.home.watch(self, READ)
        except OSError:
            self.home.later(_PAUSE_S, self._go_on)

    def _evict(self) -> None:
        """Close the connection that has been idle longest, if one is idle."""
        before = time.monotonic() - _SETTLED_S
        idle = [(c.idle_since or before, c) for c in list(self._connections)]
        since, connection = min(idle, key=lambda entry: entry[0], default=(before, None))
        if connection is not None and since < before:
            connection.reactor.call(connection.evict)


class ServerConnection:
    """One reader: header, block numbers, reply, and again."""

    def __init__(self, sock: socket.socket, reactor: Reactor, listener: TcpListener) -> None:
        self.sock = sock
        self.reactor = reactor
        self.deadline: float | None = time.monotonic() + _REQUEST_TIMEOUT_S
        self.idle_since: float | None = time.monotonic()
        """None while an authenticated request is read or answered."""
        self._listener = listener
        self._limits = listener.limits
        self._arena = listener.arena
        self._leases = listener.leases
        self._request: Request | None = None
        self._input = bytearray()
        self._skip = 0
        """Bytes of a refused request's block list that still come."""
        self._parts: deque[memoryview] = deque()
        """Read into while a request comes, sent from while a reply goes."""
        self._runs: Iterator[tuple[int, int, int]] = iter(())
        self._expect(REQUEST_BYTES)
        self._sending = False
        self._word_due = False

    def ready(self) -> None:
        if self._sending:
            self._send()
        elif self._skip:
            self._skip_some()
        else:
            self._receive()

    def evict(self) -> None:
        """Close it, unless a request has come in the meantime."""
        if self.idle_since is not None:
            self._listener.stats.count("evicted")
            self.reactor.close(self, "evicted: room for others")

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self._parts.clear()
        self._listener.forget(self)
        if reason.startswith("protocol"):
            self._listener.stats.count("rubbish")

    def _expect(self, num_bytes: int) -> None:
        self._input = bytearray(num_bytes)
        self._parts.append(memoryview(self._input))

    def _receive(self) -> None:
        if not receive_some(self.sock, self._parts):
            return
        if self._request is None and len(self._input) == REQUEST_BYTES:
            self._keep_deadline_of_first_byte()
        if self._parts:
            return
        if self._request is None:
            self._begin(decode_request(self._input))
        else:
            self._answer(self._request)

    def _keep_deadline_of_first_byte(self) -> None:
        limit = time.monotonic() + _REQUEST_TIMEOUT_S
        self.deadline = limit if self.deadline is None else min(self.deadline, limit)

    def _begin(self, request: Request) -> None:
        """The header is here."""
        if request.num_blocks > self._arena.num_blocks:
            raise Broken("protocol: more blocks than there are")
        self._request = request
        if not self._is_lent(request):
            # Its list is read and dropped: what is unread at a close would destroy the reply.
            self._skip = request.num_blocks * ID_BYTES
            if not self._skip:
                self._refuse(Status.LEASE_LOST)
            return
        self.idle_since = None
        if request.num_blocks:
            self._expect(request.num_blocks * ID_BYTES)
        else:
            self._input = bytearray()
            self._answer(request)

    def _skip_some(self) -> None:
        try:
            num_bytes = len(self.sock.recv(min(self._skip, _SKIP_BYTES)))
        except (BlockingIOError, InterruptedError):
            return
        if not num_bytes:
            raise Broken("closed: the peer closed the connection", peer_gone=True)
        self._skip -= num_bytes
        if not self._skip:
            self._refuse(Status.LEASE_LOST)

    def _is_lent(self, request: Request) -> bool:
        known = request.nonce != 0 and request.slot < self._leases.num_slots
        return known and self._leases.read(request.slot) == request.nonce

    def _answer(self, request: Request) -> None:
        """The whole request is here."""
        blocks = array("I")
        blocks.frombytes(self._input)
        if not self._is_lent(request):
            self._refuse(Status.LEASE_LOST)
            return
        size = self._arena.block_bytes
        wrong_size = request.num_blocks > 0 and request.block_bytes != size
        if wrong_size or out_of_range(blocks, self._arena.num_blocks):
            self._refuse(Status.WRONG_BLOCKS)
            return
        self._listener.stats.count("served")
        self._runs = runs(blocks, blocks, max(1, _SEND_BYTES // size))
        self._word_due = True
        self._reply(Status.OK, request.num_blocks * size)

    def _refuse(self, status: Status) -> None:
        self._listener.stats.count("refused")
        self._reply(status, 0)

    def _reply(self, status: Status, num_bytes: int) -> None:
        self._sending = True
        self._parts.append(memoryview(encode_reply(status, num_bytes)))
        self.deadline = time.monotonic() + self._limits.idle_timeout_s
        self._send()

    def _send(self) -> None:
        """A few megabytes at most, then it is the others' turn."""
        throttle = self._limits.throttle_bytes_per_s
        sent = 0
        for _ in range(1 if throttle else _TURNS):
            self._fill()
            sent = send_some(self.sock, self._parts)
            if not self._parts and not self._fill():
                self._rest()
                return
            if not sent:
                break
        if sent:
            self.deadline = time.monotonic() + self._limits.idle_timeout_s
        if throttle:
            self.reactor.watch(self, 0)
            self.reactor.later(sent / throttle, lambda: self.reactor.watch(self, WRITE))
        else:
            self.reactor.watch(self, WRITE)

    def _fill(self) -> bool:
        """More to send, if there is: data first; the word is read when all of it is sent."""
        size = self._arena.block_bytes
        num_bytes = 0
        while len(self._parts) < MAX_PARTS and num_bytes < _SEND_BYTES:
            run = next(self._runs, None)
            if run is None:
                break
            start, _, count = run
            self._parts.append(self._arena.memory[start * size : (start + count) * size])
            num_bytes += count * size
        if not self._parts and self._word_due and self._request is not None:
            self._word_due = False
            nonce = self._request.nonce if self._is_lent(self._request) else 0
            self._parts.append(memoryview(WORD.pack(nonce)))
        return bool(self._parts)

    def _rest(self) -> None:
        """Wait for the next request."""
        self._sending = False
        self._request = None
        self._expect(REQUEST_BYTES)
        self.idle_since = time.monotonic()
        self.deadline = self.idle_since + self._limits.idle_timeout_s
        self.reactor.watch(self, READ)

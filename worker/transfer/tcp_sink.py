"""The sink's side of `tcp`: pulls over pooled connections, straight into the arena's blocks.

There is no timeout for data: the caller decides about progress, and a frozen source leaves the
operation live until it wakes up, dies, or the caller aborts. An abort is safe here: the socket is
closed in the thread that reads it, so nothing lands after the end.
"""

import errno
import socket
import time
from array import array
from collections import deque
from typing import Final

from protocol.handoff import Offer, TcpOffer
from worker.transfer.base import PullSpec
from worker.transfer.operations import Operation, runs
from worker.transfer.reactor import READ, WRITE, Broken, Reactor
from worker.transfer.sink_pool import SinkPool, refusal
from worker.transfer.tcp_wire import (
    MAX_PARTS,
    REPLY_BYTES,
    WORD,
    Request,
    Status,
    decode_reply,
    encode_request,
    prepare,
    receive_some,
    send_some,
)

_RUN_BYTES: Final = 1 << 20
_TURNS: Final = 4
"""System calls in a row for one connection."""
_IDLE_S: Final = 30.0
"""Shorter than the source's own patience, so that a pooled connection is rarely a dead one."""
_MAX_RETRIES: Final = 3
_STARTS: Final = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)
_UNREACHABLE: Final = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
)


class SinkConnection:
    """One connection to one source: connect, then one operation after the other."""

    def __init__(
        self,
        sock: socket.socket,
        offer: Offer,
        pool: "SinkPool[SinkConnection]",
        reactor: Reactor,
        connect_timeout_s: float,
    ) -> None:
        self.sock = sock
        self.offer = offer
        self.deadline: float | None = time.monotonic() + connect_timeout_s
        self._pool = pool
        self._reactor = reactor
        self._connected = False
        self._operation: Operation | None = None
        self._requests: deque[memoryview] = deque()
        self._parts: deque[memoryview] = deque()
        self._runs = runs((), (), 1)
        self._header = bytearray(REPLY_BYTES)
        self._word = bytearray(WORD.size)
        self._is_word_due = False
        self._received = 0

    def begin(self, operation: Operation) -> None:
        self._operation = operation
        self._received = 0
        local = operation.spec.local if operation.scratch_slot is None else ()
        self._runs = runs(local, local, max(1, _RUN_BYTES // self._pool.arena.block_bytes))
        self._is_word_due = True
        self._parts.append(memoryview(self._header))
        self._refill()
        self._requests.extend(_request_parts(operation))
        if self._connected:
            self.deadline = None
            self._reactor.try_now(self)

    def ready(self) -> None:
        if not self._connected:
            self._finish_connect()
        if self._operation is None:
            # Idle and readable: the source has closed it, or says what nobody asked for.
            raise Broken("closed: by the source while idle", peer_gone=False)
        if not self._requests:
            self._receive(self._operation)
            return
        send_some(self.sock, self._requests)
        self._reactor.watch(self, WRITE if self._requests else READ)

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self._parts.clear()
        self._requests.clear()
        operation, self._operation = self._operation, None
        if operation is None:
            self._pool.lost(None, self)
        elif peer_gone and self._may_retry(operation):
            self._pool.retry(operation, self.offer)
        else:
            operation.end(False, reason, peer_gone=peer_gone)
            self._pool.lost(operation, self)

    def _may_retry(self, operation: Operation) -> bool:
        """A living source closes what is idle: a request that crosses that is sent once more. A
        dead one refuses the next connection."""
        is_unheard = self._connected and self._received == 0 and not operation.aborted
        return is_unheard and operation.retries < _MAX_RETRIES

    def _finish_connect(self) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, f"connect: {errno.errorcode.get(code, code)}")
        self._connected = True
        self.deadline = None

    def _receive(self, operation: Operation) -> None:
        """Header, data and word come in one stream. Data that follows a bad header may have
        landed already, in blocks that are this operation's own."""
        for _ in range(_TURNS):
            received = receive_some(self.sock, self._parts)
            if not received:
                return
            is_header_new = self._received < REPLY_BYTES
            self._received += received
            if self._received < REPLY_BYTES:
                return
            if is_header_new and not self._is_accepted(operation):
                return
            operation.num_bytes_done = min(self._received - REPLY_BYTES, operation.num_bytes)
            self._refill()
            if not self._parts:
                self._end(operation, "", WORD.unpack(self._word)[0])
                return

    def _is_accepted(self, operation: Operation) -> bool:
        """The reply's header is here; if it is a refusal, the operation ends."""
        status, num_bytes = decode_reply(self._header)
        if status is Status.OK:
            if num_bytes != operation.num_bytes:
                raise Broken("protocol: another length than asked for")
            return True
        if self._received > REPLY_BYTES:
            raise Broken("protocol: data after a refusal")
        self._parts.clear()
        self._end(operation, *refusal(operation, status))
        return False

    def _refill(self) -> None:
        """Where the next bytes go: the blocks, and behind the last of them the word."""
        size = self._pool.arena.block_bytes
        while len(self._parts) < MAX_PARTS:
            run = next(self._runs, None)
            if run is None:
                break
            _, start, count = run
            self._parts.append(self._pool.arena.memory[start * size : (start + count) * size])
        else:
            return
        if self._is_word_due:
            self._is_word_due = False
            self._parts.append(memoryview(self._word))

    def _end(self, operation: Operation, reason: str, word: int | None) -> None:
        """The exchange is complete; the connection is clean and waits for the next."""
        if operation.scratch_slot is not None and word is not None:
            self._pool.scratch.write(operation.scratch_slot, word)
        self._operation = None  # not before: who raises there is closed, and the operation ended
        self.deadline = time.monotonic() + _IDLE_S
        operation.end(not reason, reason, word=word)
        self._pool.finished(operation, self)


def connect(
    offer: Offer,
    pool: "SinkPool[SinkConnection]",
    reactor: Reactor,
    connect_timeout_s: float,
) -> SinkConnection:
    """Start connecting, in the reactor's thread. Raises Broken where that fails at once."""
    assert isinstance(offer, TcpOffer)
    try:
        sock = _connecting(offer)
    except OSError as error:
        gone = error.errno in _UNREACHABLE
        raise Broken(f"connect: {error.strerror or error}", peer_gone=gone) from error
    connection = SinkConnection(sock, offer, pool, reactor, connect_timeout_s)
    reactor.add(connection, WRITE)
    return connection


def _connecting(offer: TcpOffer) -> socket.socket:
    """Raises OSError."""
    family, address = _numeric_address(offer)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare(sock)
        code = sock.connect_ex(address)
        if code not in _STARTS:
            raise OSError(code, f"connect: {errno.errorcode.get(code, code)}")
    except BaseException:
        sock.close()
        raise
    return sock


def _numeric_address(offer: TcpOffer) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Raises OSError unless the host is an IP address: names are resolved by the source, since
    asking a name server here could stall every transfer."""
    found = socket.getaddrinfo(
        offer.host, offer.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def _request_parts(operation: Operation) -> list[memoryview]:
    spec: PullSpec = operation.spec
    is_pull = operation.scratch_slot is None
    blocks = array("I", spec.remote if is_pull else ())
    header = encode_request(Request(spec.slot, len(blocks), spec.nonce, spec.block_bytes))
    parts = [memoryview(header)]
    if blocks:
        parts.append(memoryview(blocks.tobytes()))
    return parts

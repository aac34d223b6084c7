"""The sink's side of `tcp`: pulls over pooled connections, straight into the arena's blocks.

There is no timeout for data: the caller decides about progress, and a frozen source leaves the
operation live until it wakes up, dies, or the caller aborts. An abort is safe here: the socket is
closed in the thread that reads it, so nothing lands after the end.
"""

import errno
import socket
import time
from array import array
from collections import OrderedDict, deque
from typing import Final

from protocol.handoff import TcpOffer
from worker.kv.arena import Arena, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.operations import Operation, out_of_range, runs, wrong_local
from worker.transfer.reactor import READ, WRITE, Broken, Reactor
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
_MAX_IDLE: Final = 64
_MAX_RETRIES: Final = 3
_STARTS: Final = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)
_UNREACHABLE: Final = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)
)


class SinkPool:
    """One reactor's pulls and connections. All methods run in the reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        arena: Arena,
        scratch: ScratchWords,
        *,
        connect_timeout_s: float,
        max_per_peer: int,
        max_active: int,
    ) -> None:
        self.reactor = reactor
        self.arena = arena
        self.scratch = scratch
        self.connect_timeout_s = connect_timeout_s
        self._max_per_peer = max_per_peer
        self._max_active = max_active
        # Bounded by the callers: an operation has blocks of the arena or a scratch word.
        self._waiting: OrderedDict[Operation, None] = OrderedDict()
        self._active: dict[Operation, SinkConnection] = {}
        self._active_of: dict[TcpOffer, int] = {}
        self._idle: OrderedDict[SinkConnection, None] = OrderedDict()

    def submit(self, operation: Operation) -> None:
        if operation.aborted:
            operation.end(False, "aborted: given up by the caller")
            return
        wrong = self._wrong(operation)
        if wrong:
            operation.end(False, wrong)
            return
        self._waiting[operation] = None
        self._start_waiting()

    def abort(self, operation: Operation) -> None:
        if operation in self._waiting:
            del self._waiting[operation]
            operation.end(False, "aborted: given up by the caller")
        elif operation in self._active:
            self.reactor.close(self._active[operation], "aborted: given up by the caller")

    def stop(self) -> None:
        """What waits ends here; what ran has ended when the reactor closed its socket."""
        while self._waiting:
            operation, _ = self._waiting.popitem(last=False)
            operation.end(False, "stopped: the worker leaves")

    def retry(self, operation: Operation, offer: TcpOffer) -> None:
        """The connection was closed before it answered: once more, on a new one."""
        operation.retries += 1
        self._leave(operation, offer)
        self._start(operation, offer, fresh=True)
        self._start_waiting()

    def finished(self, operation: Operation, connection: "SinkConnection") -> None:
        """Keep the connection for the next."""
        self._leave(operation, connection.offer)
        self._idle[connection] = None
        while len(self._idle) > _MAX_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            self.reactor.close(oldest, "evicted: room for others")
        self._start_waiting()

    def lost(self, operation: Operation | None, connection: "SinkConnection") -> None:
        """The connection is closed; the operation has been told."""
        self._idle.pop(connection, None)
        if operation is not None:
            self._leave(operation, connection.offer)
            self._start_waiting()

    def _wrong(self, operation: Operation) -> str:
        if not isinstance(operation.spec.offer, TcpOffer):
            return "bad_request: not an offer of tcp"
        if not encodes(operation.spec):
            return "bad_request: numbers that no source has"
        if operation.scratch_slot is not None:
            return ""
        return wrong_local(operation.spec, self.arena.num_blocks, self.arena.block_bytes)

    def _start_waiting(self) -> None:
        """In order, but nobody waits behind operations of a peer that is full (or frozen)."""
        if self.reactor.is_stopping:
            return
        for operation in list(self._waiting):
            if len(self._active) >= self._max_active:
                return
            offer = operation.spec.offer
            assert isinstance(offer, TcpOffer)
            if self._active_of.get(offer, 0) < self._max_per_peer:
                del self._waiting[operation]
                self._start(operation, offer)

    def _start(self, operation: Operation, offer: TcpOffer, *, fresh: bool = False) -> None:
        pooled = (
            None if fresh else next((c for c in reversed(self._idle) if c.offer == offer), None)
        )
        if pooled is not None:
            del self._idle[pooled]
        try:
            connection = pooled or connect(offer, self)
        except OSError as error:
            reason = f"connect: {error.strerror or error}"
            operation.end(False, reason, peer_gone=error.errno in _UNREACHABLE)
            return
        self._active[operation] = connection
        self._active_of[offer] = self._active_of.get(offer, 0) + 1
        connection.begin(operation)

    def _leave(self, operation: Operation, offer: TcpOffer) -> None:
        if self._active.pop(operation, None) is None:
            return
        left = self._active_of[offer] - 1
        if left:
            self._active_of[offer] = left
        else:
            del self._active_of[offer]


class SinkConnection:
    """One connection to one source: connect, then one operation after the other."""

    def __init__(self, sock: socket.socket, offer: TcpOffer, pool: SinkPool) -> None:
        self.sock = sock
        self.offer = offer
        self.deadline: float | None = time.monotonic() + pool.connect_timeout_s
        self._pool = pool
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
            self._pool.reactor.try_now(self)

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
        self._pool.reactor.watch(self, WRITE if self._requests else READ)

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self._parts.clear()
        self._requests.clear()
        operation, self._operation = self._operation, None
        if operation is None:
            self._pool.lost(None, self)
        elif peer_gone and not self._pool.reactor.is_stopping and self._may_retry(operation):
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
        self._refused(operation, status)
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

    def _refused(self, operation: Operation, status: Status) -> None:
        if status is not Status.LEASE_LOST:
            self._end(operation, "refused: the source does not have such blocks", None)
        elif operation.scratch_slot is not None:
            self._end(operation, "", 0)
        else:
            self._end(operation, "lease_lost: the source does not hold the blocks any more", 0)

    def _end(self, operation: Operation, reason: str, word: int | None) -> None:
        """The exchange is complete; the connection is clean and waits for the next."""
        self._operation = None
        self.deadline = time.monotonic() + _IDLE_S
        if operation.scratch_slot is not None and word is not None:
            self._pool.scratch.write(operation.scratch_slot, word)
        operation.end(not reason, reason, word=word)
        self._pool.finished(operation, self)


def connect(offer: TcpOffer, pool: SinkPool) -> SinkConnection:
    """Start connecting, in the pool's reactor. Raises OSError where that fails at once."""
    family, address = numeric_address(offer)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare(sock)
        code = sock.connect_ex(address)
        if code not in _STARTS:
            raise OSError(code, f"connect: {errno.errorcode.get(code, code)}")
    except BaseException:
        sock.close()
        raise
    connection = SinkConnection(sock, offer, pool)
    pool.reactor.add(connection, WRITE)
    return connection


def numeric_address(offer: TcpOffer) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Raises OSError unless the host is an IP address: names are resolved by the source, since
    asking a name server here could stall every transfer."""
    found = socket.getaddrinfo(
        offer.host, offer.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def encodes(spec: PullSpec) -> bool:
    """Whether a request can carry it: 32-bit slot and blocks, 64-bit nonce."""
    blocks_fit = not out_of_range(spec.remote, 1 << 32)
    return blocks_fit and 0 <= spec.slot < 1 << 32 and 0 <= spec.nonce < 1 << 64


def _request_parts(operation: Operation) -> list[memoryview]:
    spec: PullSpec = operation.spec
    is_pull = operation.scratch_slot is None
    blocks = array("I", spec.remote if is_pull else ())
    header = encode_request(Request(spec.slot, len(blocks), spec.nonce, spec.block_bytes))
    parts = [memoryview(header)]
    if blocks:
        parts.append(memoryview(blocks.tobytes()))
    return parts

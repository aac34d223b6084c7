"""The sink's side of `ucx`: pulls over pooled endpoints, received straight into the arena's blocks.

There is no timeout for data: the caller decides about progress, and a frozen source leaves the
operation live until it wakes up, dies, or the caller aborts. An abort closes the endpoint in the
thread that makes all copies; the operation ends when every receive on it is terminal.
"""

import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Final

from protocol.handoff import FabricOffer, Offer
from worker.transfer.operations import Operation, runs
from worker.transfer.reactor import Broken
from worker.transfer.sink_pool import SinkPool, refusal
from worker.transfer.tcp_wire import (
    REPLY_BYTES,
    WORD,
    Request,
    Status,
    decode_reply,
    encode_request,
)
from worker.transfer.ucx_library import Posted
from worker.transfer.ucx_loop import UcxLoop

_RUN_BYTES: Final = 1 << 20
_WINDOW: Final = 64
_WINDOW_BYTES: Final = 8 << 20
"""Receives posted ahead: what finds none is copied twice."""
_IDLE_S: Final = 120.0
"""Long, since a connection costs up to seconds on a loaded machine; shorter than the source's own
patience, so that a pooled one is rarely a dead one."""
_MAX_RETRIES: Final = 3


class UcxSinkConnection:
    """One endpoint to one source: connect, then one operation after the other."""

    def __init__(
        self,
        offer: Offer,
        pool: "SinkPool[UcxSinkConnection]",
        loop: UcxLoop,
        connect_timeout_s: float,
    ) -> None:
        assert isinstance(offer, FabricOffer)
        self.offer: Offer = offer
        self.stream = loop.library.connect(offer.host, offer.port)
        self.deadline: float | None = time.monotonic() + connect_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._pool = pool
        self._loop = loop
        self._operation: Operation | None = None
        self._script: Iterator[Posted] = iter(())
        self._waits_for: Posted | None = None
        self._is_answered = False
        # Posted while nothing was asked, so that what an idle source says or does is seen.
        try:
            self._reply = self.stream.receive(bytearray(REPLY_BYTES))
        except BaseException:
            self.stream.close()  # nobody else knows it yet
            raise
        loop.add(self)

    def begin(self, operation: Operation) -> None:
        self._operation = operation
        # On a pooled one the idle time may be over before the request has left.
        self.deadline = max(self.deadline or 0.0, time.monotonic() + self._connect_timeout_s)
        self._is_answered = False
        operation.num_bytes_done = 0  # all of it once more, if it was begun on another connection
        self._script = self._exchange(operation)
        self._waits_for = None
        self._loop.poke()

    def advance(self) -> None:
        if self._operation is None:
            if self._reply.is_done():
                raise Broken("protocol: the source says what nobody asked for")
            return
        while self._waits_for is None or self._waits_for.is_done():
            self._waits_for = next(self._script, None)
            if self._waits_for is None:
                return
        if not self.stream.num_unsent:
            self.deadline = None  # connected: the caller decides how long is too long

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self._script = iter(())
        operation, self._operation = self._operation, None
        if operation is None:
            self._pool.lost(None, self)
        elif peer_gone and self._may_retry(operation, reason):
            self._pool.retry(operation, self.offer)
        else:
            operation.end(False, reason, peer_gone=peer_gone)
            self._pool.lost(operation, self)

    def _may_retry(self, operation: Operation, reason: str) -> bool:
        """A living source closes what is idle: a request that crosses that is sent once more. A
        dead one refuses the next connection."""
        is_unheard = reason.startswith("closed") and not self._is_answered
        return is_unheard and not operation.aborted and operation.retries < _MAX_RETRIES

    def _exchange(self, operation: Operation) -> Iterator[Posted]:
        """Request, reply, blocks, word. Yields what must be done before it goes on."""
        for request in _request_parts(operation):
            self.stream.send(request)
        yield self._reply
        self._is_answered = True
        status, num_bytes = decode_reply(self._reply.buffer)
        if status is not Status.OK:
            self._end(operation, *refusal(operation, status))
            return
        if num_bytes != operation.num_bytes:
            raise Broken("protocol: another length than asked for")
        posted: deque[Posted] = deque()
        ahead = 0
        for memory in self._places(operation):
            while posted and (len(posted) == _WINDOW or ahead + len(memory) > _WINDOW_BYTES):
                yield posted[0]
                part = posted.popleft()
                ahead -= part.num_bytes
                operation.num_bytes_done += part.num_bytes
            posted.append(self.stream.receive(memory))
            ahead += len(memory)
        word = self.stream.receive(bytearray(WORD.size))
        for part in posted:
            yield part
            operation.num_bytes_done += part.num_bytes
        yield word
        self._end(operation, "", WORD.unpack(word.buffer)[0])

    def _places(self, operation: Operation) -> Iterator[memoryview]:
        if operation.scratch_slot is not None:
            return
        arena, local = self._pool.arena, operation.spec.local
        size = arena.block_bytes
        for _, start, count in runs(local, local, max(1, _RUN_BYTES // size)):
            yield arena.memory[start * size : (start + count) * size]

    def _end(self, operation: Operation, reason: str, word: int | None) -> None:
        """The exchange is complete; the connection is clean and waits for the next."""
        if operation.scratch_slot is not None and word is not None:
            self._pool.scratch.write(operation.scratch_slot, word)
        self._operation = None  # not before: who raises there is closed, and the operation ended
        self.deadline = time.monotonic() + _IDLE_S
        operation.end(not reason, reason, word=word)
        try:
            self._reply = self.stream.receive(bytearray(REPLY_BYTES))
        except Exception:
            self._pool.lost(operation, self)
            raise
        self._pool.finished(operation, self)


def _request_parts(operation: Operation) -> list[bytes]:
    spec = operation.spec
    blocks = array("I", spec.remote if operation.scratch_slot is None else ())
    header = encode_request(Request(spec.slot, len(blocks), spec.nonce, spec.block_bytes))
    return [header, blocks.tobytes()] if blocks else [header]

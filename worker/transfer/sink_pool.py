"""The sink's pulls over pooled connections, for two-sided transports: who starts when, on which.

Knows that a connection serves one operation at a time and ends it, nothing of what it is made of.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from protocol.handoff import Offer
from worker.kv.arena import Arena, ScratchWords
from worker.transfer.base import OnEnd, PullSpec
from worker.transfer.operations import LiveCount, Operation, out_of_range, wrong_local
from worker.transfer.reactor import Broken
from worker.transfer.tcp_wire import Status

_logger = logging.getLogger(__name__)

_MAX_IDLE: Final = 64


class Connection(Protocol):
    """A way to one source."""

    @property
    def offer(self) -> Offer: ...

    def begin(self, operation: Operation) -> None:
        """Ask for it. The pool hears `finished`, `retry` or `lost`. If it raises, it has the
        operation all the same, and ends it when it is closed."""


C = TypeVar("C", bound=Connection)
C_contra = TypeVar("C_contra", contravariant=True)


class Loop(Protocol[C_contra]):
    """The thread that serves the connections."""

    @property
    def is_stopping(self) -> bool: ...

    def call(self, function: Callable[[], None]) -> bool: ...

    def close(self, channel: C_contra, reason: str, *, peer_gone: bool = False) -> None: ...


class SinkPool(Generic[C]):
    """One thread's pulls and connections. All methods but `begin` run in the loop's thread.

    `connect` begins a connection and raises Broken where that fails at once; `wrong_offer` says why
    an offer is not for this transport, empty if it is.
    """

    def __init__(
        self,
        loop: Loop[C],
        arena: Arena,
        scratch: ScratchWords,
        *,
        connect: "Callable[[Offer, SinkPool[C]], C]",
        wrong_offer: Callable[[Offer], str],
        max_per_peer: int,
        max_active: int,
    ) -> None:
        self.loop = loop
        self.arena = arena
        self.scratch = scratch
        self._connect = connect
        self._wrong_offer = wrong_offer
        self._max_per_peer = max_per_peer
        self._max_active = max_active
        # Bounded by the callers: an operation has blocks of the arena or a scratch word.
        self._waiting: OrderedDict[Operation, None] = OrderedDict()
        self._active: dict[Operation, C] = {}
        self._active_of: dict[Offer, int] = {}
        self._idle: OrderedDict[C, None] = OrderedDict()

    def begin(
        self, spec: PullSpec, on_end: OnEnd, live: LiveCount, scratch_slot: int | None
    ) -> Operation:
        """A new operation on its way; from any thread."""

        def abort(operation: Operation) -> None:
            self.loop.call(lambda: self.abort(operation))

        operation = Operation(spec, on_end, live, scratch_slot=scratch_slot, on_abort=abort)
        if not self.loop.call(lambda: self.submit(operation)):
            operation.end(False, "stopped: the worker leaves")
        return operation

    def submit(self, operation: Operation) -> None:
        if operation.aborted:
            operation.end(False, "aborted: given up by the caller")
            return
        try:
            wrong = self._wrong(operation)
        except Exception:
            _logger.exception("a transfer could not be looked at")
            wrong = "internal: the check raised"
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
            self.loop.close(self._active[operation], "aborted: given up by the caller")

    def stop(self) -> None:
        """What waits ends here; what ran has ended when the loop closed its connection."""
        while self._waiting:
            operation, _ = self._waiting.popitem(last=False)
            operation.end(False, "stopped: the worker leaves")

    def retry(self, operation: Operation, offer: Offer) -> None:
        """The connection was closed before it answered: once more, on a new one. Who leaves does
        not blame the source for it."""
        operation.retries += 1
        self._leave(operation, offer)
        if self.loop.is_stopping:
            operation.end(False, "stopped: the worker leaves")
            return
        self._start(operation, fresh=True)
        self._start_waiting()

    def finished(self, operation: Operation, connection: C) -> None:
        """Keep the connection for the next."""
        self._leave(operation, connection.offer)
        self._idle[connection] = None
        while len(self._idle) > _MAX_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            self.loop.close(oldest, "evicted: room for others")
        self._start_waiting()

    def lost(self, operation: Operation | None, connection: C) -> None:
        """The connection is closed; the operation has been told."""
        self._idle.pop(connection, None)
        if operation is not None:
            self._leave(operation, connection.offer)
            self._start_waiting()

    def _wrong(self, operation: Operation) -> str:
        wrong = self._wrong_offer(operation.spec.offer)
        if wrong:
            return f"bad_request: {wrong}"
        if not _encodes(operation.spec):
            return "bad_request: numbers that no source has"
        if operation.scratch_slot is not None:
            return ""
        return wrong_local(operation.spec, self.arena.num_blocks, self.arena.block_bytes)

    def _start_waiting(self) -> None:
        """In order, but nobody waits behind operations of a peer that is full (or frozen)."""
        if self.loop.is_stopping:
            return
        for operation in list(self._waiting):
            if len(self._active) >= self._max_active:
                return
            if operation not in self._waiting:
                continue  # started meanwhile: a connection that breaks at once comes back to here
            if self._active_of.get(operation.spec.offer, 0) < self._max_per_peer:
                del self._waiting[operation]
                self._start(operation)

    def _start(self, operation: Operation, *, fresh: bool = False) -> None:
        offer = operation.spec.offer
        pooled = (
            None if fresh else next((c for c in reversed(self._idle) if c.offer == offer), None)
        )
        if pooled is not None:
            del self._idle[pooled]
        try:
            connection = pooled or self._connect(offer, self)
        except Broken as error:
            operation.end(False, str(error), peer_gone=error.peer_gone)
            return
        except Exception:
            _logger.exception("no connection could be made")
            operation.end(False, "internal: no connection could be made")
            return
        self._active[operation] = connection
        self._active_of[offer] = self._active_of.get(offer, 0) + 1
        try:
            connection.begin(operation)
        except Exception:
            _logger.exception("a transfer could not be asked for")
            self.loop.close(connection, "internal: it could not be asked for")

    def _leave(self, operation: Operation, offer: Offer) -> None:
        if self._active.pop(operation, None) is None:
            return
        left = self._active_of[offer] - 1
        if left:
            self._active_of[offer] = left
        else:
            del self._active_of[offer]


def refusal(operation: Operation, status: Status) -> tuple[str, int | None]:
    """What a source's answer other than OK means: the operation's reason ("" for a word that was
    read, as zero), and the word."""
    if status is not Status.LEASE_LOST:
        return "refused: the source does not have such blocks", None
    if operation.scratch_slot is not None:
        return "", 0
    return "lease_lost: the source does not hold the blocks any more", 0


def _encodes(spec: PullSpec) -> bool:
    """Whether a request can carry it: 32-bit slot and blocks, 64-bit nonce."""
    blocks_fit = not out_of_range(spec.remote, 1 << 32)
    return blocks_fit and 0 <= spec.slot < 1 << 32 and 0 <= spec.nonce < 1 << 64

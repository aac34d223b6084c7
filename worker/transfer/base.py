"""The transfer port: moving KV blocks between two workers' arenas.

Both operations are started by the owner of the destination. None of them can be cancelled: until
`on_end` was called, the transport may write into the local blocks (or the scratch word), whatever
the caller has decided in the meantime. `on_end` is called exactly once for each operation, after
the last byte that will ever be written: from a thread of the transport's own, or before the call
that starts the operation returns.
"""

from array import array
from collections.abc import Callable
from typing import Protocol

import msgspec

from protocol.handoff import Offer
from worker.handoff.ends import TransferEnd as TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords

OnEnd = Callable[[TransferEnd], None]


class PassedOver(Exception):
    """A transport that nobody asked for by name could not start; the others go on without it."""


class PullSpec(msgspec.Struct, frozen=True):
    """Copy `remote[i]` of the source's arena into `local[i]` of ours, for every i."""

    offer: Offer
    remote: "array[int]"
    local: "array[int]"
    block_bytes: int
    slot: int
    """Lease slot and nonce authenticate the reader on two-sided transports."""
    nonce: int


class PullTicket(Protocol):
    """A running pull."""

    @property
    def num_bytes_done(self) -> int:
        """Bytes that have arrived so far; read from any thread."""

    def abort(self) -> None:
        """Ask for an early end, best effort, from any thread; never blocks. Only `on_end` proves
        that nothing more lands: some transports cannot stop what is in flight."""


class Transfer(Protocol):
    """One transport in one worker process; serves our arena and pulls from others'."""

    @property
    def name(self) -> str: ...

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        """Register the memory, listen. Blocking; called before the loop has work. Raises
        ConfigError (for example: the port is in use), or PassedOver."""

    def offer(self) -> Offer:
        """What goes into the handles we give out."""

    def refuse(self, offer: Offer) -> str:
        """Why we cannot pull from that offer; empty if we can."""

    def pull(self, spec: PullSpec, on_end: OnEnd) -> PullTicket:
        """Start copying; never blocks."""

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        """Start reading the source's lease word into our scratch slot (zeroed by the caller);
        the end's `word` is what the slot then holds. Posted after the pull is terminal."""

    def num_live(self) -> int:
        """Operations whose `on_end` has not been called."""

    def stop(self) -> bool:
        """Stop serving and pulling; False if an operation is still live."""

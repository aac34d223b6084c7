"""The lending side of the hand-off: leases on our blocks, and the words that vouch for them.

A lease is a permission to read some blocks without asking. Readers do not say when they begin, and
nobody can stop them: a reader finds out for itself, from the lease's *word* in the lease table,
whether the blocks were held until after it had read the last of them. That is sound because of
two orders, both kept here:

- lend: the caller has completed the last write of KV; references are taken; **then** the word is
  written (the handle, which names slot and nonce, can only leave after that);
- end: the word is zeroed; **then** the references are dropped, and with them the right to keep
  others from writing the blocks.

So a reader that sees the nonce in the word, after its last byte has come, knows that all bytes were
read under the references. What it read otherwise is worthless. It needs no message from us: we
may be slow, stopped or long dead.

A nonce is never zero and fresh for each lease, so the next lease in the same slot does not vouch
for this one; and a slot is used again only after all other free ones (first freed, first used).

The table. A lease that has ended is forgotten, and what comes for it later changes nothing:

    LENT   release (the router: the KV arrived, or nobody wants it)   RELEASED
    LENT   revoke (we want the blocks back)                           REVOKED
    LENT   expire (no renewal for `lease_s`)                          EXPIRED
    LENT   renew                                                      LENT, for `lease_s` from now

A lease whose time has passed is LENT until `expire` finds it: a renewal that was there first
counts (we were slow, not the router).

Time is an argument and never runs backwards here, so that the order of renewal is the order of
expiry. Everything costs O(1) for each lease and block named.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final, Protocol

import msgspec

from protocol.errors import LocalError
from worker.kv.pool import BlockPool


class LeaseWords(Protocol):
    """The lease table's memory; each call is one aligned 64-bit store."""

    def write(self, slot: int, word: int) -> None: ...

    def zero(self, slot: int) -> None: ...


class Lease(msgspec.Struct, frozen=True):
    """One lease, as it was when last touched; times in seconds of the caller's clock."""

    handle_id: str
    slot: int
    nonce: int
    blocks: tuple[int, ...]
    expires_at: float
    lent_at: float


class LeaseState(Enum):
    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    LENT = "lent"
    RELEASED = "released"
    REVOKED = "revoked"
    EXPIRED = "expired"


class LeaseEvent(Enum):
    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    RENEW = "renew"
    RELEASE = "release"
    REVOKE = "revoke"
    EXPIRE = "expire"


NEXT: Final[dict[tuple[LeaseState, LeaseEvent], LeaseState]] = {
    (LeaseState.LENT, LeaseEvent.RENEW): LeaseState.LENT,
    (LeaseState.LENT, LeaseEvent.RELEASE): LeaseState.RELEASED,
    (LeaseState.LENT, LeaseEvent.REVOKE): LeaseState.REVOKED,
    (LeaseState.LENT, LeaseEvent.EXPIRE): LeaseState.EXPIRED,
}


class Source:
    """All leases of one worker. Each handle id is lent once in the life of the process."""

    def __init__(
        self, pool: BlockPool, words: LeaseWords, *, num_slots: int, lease_s: float
    ) -> None:
        if num_slots < 1 or lease_s <= 0:
            raise LocalError(f"{num_slots} lease slots, leases of {lease_s} s")
        self.lease_s = lease_s
        self.ended: dict[str, int] = {
            state.value: 0 for state in LeaseState if state is not LeaseState.LENT
        }
        """Number of ended leases by end: released, revoked, expired."""
        self._pool = pool
        self._words = words
        self._num_slots = num_slots
        self._free_slots = deque(range(num_slots))
        self._lent: OrderedDict[str, Lease] = OrderedDict()
        """Those in state LENT, the next to expire first."""
        self._now = float("-inf")

    @property
    def num_free_slots(self) -> int:
        """Leases that can begin now."""
        return len(self._free_slots)

    @property
    def num_lent(self) -> int:
        """Leases that have not ended."""
        return len(self._lent)

    def lend(self, handle_id: str, blocks: Sequence[int], nonce: int, now: float) -> Lease | None:
        """Lend `blocks`, which a sequence holds and whose last KV write is complete.

        None if no slot is free (nothing is taken). Raises LocalError if the handle is lent, the
        nonce is not a fresh non-zero 64-bit word, or there is a block that nobody holds.
        """
        if handle_id in self._lent:
            raise LocalError(f"handle {handle_id} is lent already")
        if not 0 < nonce < 1 << 64 or not blocks:
            raise LocalError(f"handle {handle_id}: nonce {nonce}, {len(blocks)} blocks")
        if not self._free_slots:
            return None
        self._pool.lend(blocks)
        slot = self._free_slots.popleft()
        self._words.write(slot, nonce)
        now = self._advance(now)
        lease = Lease(handle_id, slot, nonce, tuple(blocks), now + self.lease_s, now)
        self._lent[handle_id] = lease
        return lease

    def renew(self, handle_ids: Iterable[str], now: float) -> None:
        """These last `lease_s` from now. Unknown and ended ones are ignored."""
        now = self._advance(now)
        for handle_id in tuple(handle_ids):
            self._move(handle_id, LeaseEvent.RENEW, now)

    def release(self, handle_ids: Iterable[str], now: float) -> list[Lease]:
        """Nobody needs these any more. Returns those that end by it."""
        return self._end(handle_ids, LeaseEvent.RELEASE, now)

    def revoke(self, handle_ids: Iterable[str], now: float) -> list[Lease]:
        """We want the blocks of these back. Returns those that end by it."""
        return self._end(handle_ids, LeaseEvent.REVOKE, now)

    def expire(self, now: float) -> list[Lease]:
        """End those that nobody has renewed in time, and return them."""
        now = self._advance(now)
        due = []
        for lease in self._lent.values():
            if lease.expires_at > now:
                break
            due.append(lease.handle_id)
        return self._end(due, LeaseEvent.EXPIRE, now)

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        first = next(iter(self._lent.values()), None)
        return None if first is None else first.expires_at

    def validate(self) -> None:
        """Raises LocalError where slots are lost or doubled, or the order of expiry is broken."""
        slots = [lease.slot for lease in self._lent.values()]
        if sorted([*slots, *self._free_slots]) != list(range(self._num_slots)):
            raise LocalError(f"slots {slots} lent, {list(self._free_slots)} free")
        deadlines = [lease.expires_at for lease in self._lent.values()]
        if deadlines != sorted(deadlines):
            raise LocalError(f"leases out of order: {deadlines}")

    def _end(self, handle_ids: Iterable[str], event: LeaseEvent, now: float) -> list[Lease]:
        now = self._advance(now)
        moved = [self._move(handle_id, event, now) for handle_id in tuple(handle_ids)]
        return [lease for lease in moved if lease is not None]

    def _move(self, handle_id: str, event: LeaseEvent, now: float) -> Lease | None:
        """Move a lease by the table; None if it is not lent (any more)."""
        lease = self._lent.get(handle_id)
        if lease is None:
            return None
        state = NEXT[LeaseState.LENT, event]
        if state is LeaseState.LENT:
            self._lent[handle_id] = msgspec.structs.replace(lease, expires_at=now + self.lease_s)
            self._lent.move_to_end(handle_id)
            return lease
        self._words.zero(lease.slot)
        del self._lent[handle_id]
        self._pool.unlend(lease.blocks)
        self._free_slots.append(lease.slot)
        self.ended[state.value] += 1
        return lease

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

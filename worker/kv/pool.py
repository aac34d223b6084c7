"""Who holds which KV block, and which blocks are free. Knows block numbers, never bytes or time.

Four kinds of references hold a block:

- *sequences*: requests that read it, or write it while it is theirs alone;
- *leases*: another worker may be reading it, at any moment, without telling anybody;
- *the transfer* of a pull that was given up, which may still write it (quarantine): at most one;
- *the cache*, under the hash of its tokens and all before them.

A block is free if and only if it has none. The first three pin it; held by the cache alone it is
evictable. From this follow five states, each block in exactly one, in this order of priority:

    quarantined   a transfer holds it       (nothing else does: see `quarantine` below)
    lent          a lease holds it
    used          a sequence holds it
    cached        only the cache holds it   (= evictable)
    free          nothing holds it

What may be asked of a block, and when (`_NEEDS`; anything else raises and changes nothing):

    verb          needs                     does
    match         cached under the hash     sequences + 1
    allocate      free or evictable         sequences = 1, not immutable; leaves the cache
    release       a sequence                sequences - 1
    store         a sequence, not stored    immutable; cached, unless that hash already is
    lend          a sequence                leases + 1
    unlend        a lease                   leases - 1
    quarantine    writable                  the sequence's reference becomes the transfer's
    unquarantine  quarantined               drops it

*Writable* is a block with one sequence and nothing else, not stored. So a block that others may
read (cached, matched, lent) is never written: who must go on in it copies it first. A block of a
pull that was given up holds anybody's guess: it can be neither stored nor lent nor matched until
its transfer is over.

Eviction takes the block whose last reference was dropped longest ago. One call that drops many
takes them for a sequence's table and drops its last block first: children before parents, so that
what stays cached can be reached from its beginning. Everything costs O(1) for each block named.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import msgspec

from protocol.errors import LocalError
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored


class PoolCounts(msgspec.Struct, frozen=True):
    """Number of blocks in each state; the sum is the pool's size."""

    free: int
    cached: int
    used: int
    lent: int
    quarantined: int


class _State(IntEnum):
    FREE = 0
    CACHED = 1
    USED = 2
    LENT = 3
    QUARANTINED = 4


@dataclass(slots=True)
class _Block:
    """References to one block."""

    sequences: int = 0
    leases: int = 0
    in_transfer: bool = False
    digest: bytes | None = None
    """The cache's reference."""
    sealed: bool = False
    """Stored: immutable until nothing refers to it, also where the cache has another copy."""
    state: _State = _State.FREE
    """As the pool's counters and lists have it; equals `derived()` between calls."""

    def derived(self) -> _State:
        if self.in_transfer:
            return _State.QUARANTINED
        if self.leases:
            return _State.LENT
        if self.sequences:
            return _State.USED
        return _State.FREE if self.digest is None else _State.CACHED

    def is_writable(self) -> bool:
        return self.sequences == 1 and not (self.sealed or self.leases or self.in_transfer)


_Verb = Literal["release", "store", "lend", "unlend", "quarantine", "unquarantine"]

_NEEDS: Final[dict[_Verb, Callable[[_Block], bool]]] = {
    "release": lambda block: block.sequences > 0,
    "store": lambda block: block.sequences > 0 and not block.sealed,
    "lend": lambda block: block.sequences > 0,
    "unlend": lambda block: block.leases > 0,
    "quarantine": _Block.is_writable,
    "unquarantine": lambda block: block.in_transfer,
}


class BlockPool:
    """The blocks `0 .. num_blocks - 1` of one arena, each of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise LocalError(f"a pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._counts = [0] * len(_State)
        self._counts[_State.FREE] = num_blocks
        self._free = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[bytes, int] = {}
        self._unreported: dict[bytes, bool] = {}
        """Net changes of the cache since the last `take_events`; True: now there."""
        self._cleared = False

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free or evictable."""
        return len(self._free) + len(self._evictable)

    def counts(self) -> PoolCounts:
        """Blocks by state."""
        return PoolCounts(*self._counts)

    def is_writable(self, block: int) -> bool:
        """One sequence refers to it and nothing else does, and it is not stored."""
        return self._known(block).is_writable()

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The longest cached prefix of `hashes`; takes one sequence reference on each block."""
        found: list[int] = []
        for digest in hashes:
            index = self._cached.get(digest)
            if index is None:
                break
            found.append(index)
        _check_distinct(found)
        for index in found:
            self._blocks[index].sequences += 1
            self._settle(index)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """`count` writable blocks with one sequence reference each, or None (and nothing is
        taken) if there are not as many. Evicts only when nothing is free."""
        if count < 0:
            raise LocalError(f"allocate {count} blocks")
        if count > self.num_available:
            return None
        taken = [self._take() for _ in range(count)]
        for index in taken:
            self._blocks[index].sequences = 1
            self._settle(index)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one sequence reference of each; what is cached stays so and becomes evictable."""
        self._check("release", blocks)
        for index in reversed(blocks):
            self._blocks[index].sequences -= 1
            self._settle(index)

    def store(self, block: int, digest: bytes) -> None:
        """The block is full and will not change: cache it under `digest`, the chained hash.

        Where that hash is cached already the older copy stays, freshened; this one is immutable
        all the same while anything refers to it.
        """
        self._check("store", (block,))
        self._blocks[block].sealed = True
        older = self._cached.get(digest)
        if older is None:
            self._blocks[block].digest = digest
            self._cached[digest] = block
            self._report(digest, stored=True)
        elif older in self._evictable:
            self._evictable.move_to_end(older)

    def lend(self, blocks: Sequence[int]) -> None:
        """Take one lease reference of each; a sequence must hold them meanwhile."""
        self._check("lend", blocks)
        for index in blocks:
            self._blocks[index].leases += 1
            self._settle(index)

    def unlend(self, blocks: Sequence[int]) -> None:
        """Drop one lease reference of each. The lease's word is zero by now."""
        self._check("unlend", blocks)
        for index in reversed(blocks):
            self._blocks[index].leases -= 1
            self._settle(index)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """The sequence lets go of these writable blocks, a transfer may still write them."""
        self._check("quarantine", blocks)
        for index in blocks:
            self._blocks[index].sequences = 0
            self._blocks[index].in_transfer = True
            self._settle(index)

    def unquarantine(self, blocks: Sequence[int]) -> None:
        """The transfer is over: the blocks are free."""
        self._check("unquarantine", blocks)
        for index in blocks:
            self._blocks[index].in_transfer = False
            self._settle(index)

    def clear_cache(self) -> None:
        """Forget all hashes. Blocks that something else holds stay held, and immutable."""
        for index in self._cached.values():
            self._blocks[index].digest = None
            self._settle(index)
        self._cached.clear()
        self._unreported.clear()
        self._cleared = True

    def take_events(self) -> list[KvEvent]:
        """What the cache gained and lost since the last call, net: at most one event of a kind,
        to be applied in their order. Bounded by the pool, however seldom it is called."""
        if not self._unreported and not self._cleared:
            return []  # After most turns.
        events: list[KvEvent] = [KvCleared()] if self._cleared else []
        removed = b"".join(digest for digest, stored in self._unreported.items() if not stored)
        stored = b"".join(digest for digest, stored in self._unreported.items() if stored)
        if removed:
            events.append(KvRemoved(removed))
        if stored:
            events.append(KvStored(stored))
        self._unreported.clear()
        self._cleared = False
        return events

    def cached_hashes(self) -> list[bytes]:
        """All hashes in the cache, for a snapshot."""
        return list(self._cached)

    def validate(self) -> None:
        """Look at every block. Raises LocalError where the rules above are broken."""
        counts = [0] * len(_State)
        for index, block in enumerate(self._blocks):
            counts[block.state] += 1
            broken = next(self._broken_rules(index, block), None)
            if broken is not None:
                raise LocalError(f"block {index}: {broken}: {block}")
        if counts != self._counts:
            raise LocalError(f"counted {counts}, kept {self._counts}")
        free = [i for i, block in enumerate(self._blocks) if block.state is _State.FREE]
        if sorted(self._free) != free:
            raise LocalError("the free list is not the free blocks")
        if len(self._evictable) != counts[_State.CACHED]:
            raise LocalError("the eviction order is not the evictable blocks")
        if len(self._cached) != sum(block.digest is not None for block in self._blocks):
            raise LocalError("the cache knows other blocks than hold a hash")

    def _broken_rules(self, index: int, block: _Block) -> Iterator[str]:
        if block.state is not block.derived():
            yield "is not in the state that its references say"
        if min(block.sequences, block.leases) < 0:
            yield "has a negative number of references"
        if block.in_transfer and (block.sequences or block.leases or block.sealed):
            yield "is quarantined and held by others"
        if (block.digest is not None or block.sequences > 1) and not block.sealed:
            yield "is shared but not immutable"
        if block.state is _State.FREE and block.sealed:
            yield "is free but immutable"
        if (index in self._evictable) is not (block.state is _State.CACHED):
            yield "is in the eviction order, or not, against its state"
        if block.digest is not None and self._cached.get(block.digest) != index:
            yield "holds a hash that the cache knows of another block"

    def _known(self, index: int) -> _Block:
        if not 0 <= index < self.num_blocks:
            raise LocalError(f"block {index} of {self.num_blocks}")
        return self._blocks[index]

    def _check(self, verb: _Verb, blocks: Sequence[int]) -> None:
        """Raises LocalError unless `verb` is allowed for all of `blocks`."""
        allowed = _NEEDS[verb]
        for index in blocks:
            block = self._known(index)
            if not allowed(block):
                raise LocalError(f"{verb} of block {index}: {block}")
        _check_distinct(blocks)

    def _take(self) -> int:
        """Take a block out of the free list, or else out of the cache. There is one."""
        if self._free:
            return self._free.popleft()
        index = next(iter(self._evictable))
        block = self._blocks[index]
        digest, block.digest = block.digest, None
        assert digest is not None
        del self._cached[digest]
        self._report(digest, stored=False)
        self._settle(index)
        return self._free.pop()

    def _settle(self, index: int) -> None:
        """References of this block have changed: bring its state, the counts and lists along."""
        block = self._blocks[index]
        before, after = block.state, block.derived()
        if after is before:
            return
        block.state = after
        self._counts[before] -= 1
        self._counts[after] += 1
        if before is _State.CACHED:
            del self._evictable[index]
        if after is _State.CACHED:
            self._evictable[index] = None
        elif after is _State.FREE:
            block.sealed = False
            self._free.append(index)

    def _report(self, digest: bytes, *, stored: bool) -> None:
        """Note a change for `take_events`; with the opposite change before, neither is news."""
        if self._unreported.pop(digest, stored) is stored:
            self._unreported[digest] = stored


def _check_distinct(blocks: Sequence[int]) -> None:
    if len(set(blocks)) != len(blocks):
        raise LocalError("the same block twice in one call")

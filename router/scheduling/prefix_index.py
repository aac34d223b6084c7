"""Who has which prefix cached: block hash -> integer bitmask of workers.

A prefix is matched by jumping: masks only lose bits with depth (a worker that evicts from the leaf
holds every block before one that it holds), so the points where they change are found by galloping
and bisection. What a worker evicted out of order is overcounted; that costs time, never truth.

It knows slots, not workers. The number of (block, worker) pairs is bounded, the oldest blocks go
first; a slot that left is swept in small steps and reused only when no mask has its bit.
"""

import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol

from protocol.blocks import HASH_BYTES, block_hashes
from protocol.errors import LocalError
from protocol.events import KvCleared, KvEvent, KvStored

_MAX_CHANGES: Final = 32
_MAX_HELD_BACK: Final = 64
_MAX_BEHIND: Final = 4
_MAX_TRIES: Final = 3
"""Snapshots in a row that may be older than what was held back for them."""
_SWEEP: Final = 512
_CHUNK: Final = 64

Match = list[tuple[int, int]]
"""(number of leading blocks, mask of the slots that hold at least so many), deepest last."""


class Hashes(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> bytes: ...


class PromptHashes:
    """The block hashes of one prompt, computed as far as somebody asks."""

    __slots__ = ("_block_size", "_known", "_packed", "_seed", "_size")

    def __init__(self, packed: bytes, block_size: int, seed: bytes) -> None:
        self._packed = packed
        self._block_size = block_size
        self._seed = seed
        self._size = len(packed) // (4 * block_size)
        self._known: list[bytes] = []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> bytes:
        known = self._known
        if index >= len(known):
            step = 4 * self._block_size
            end = min(self._size, max(index + 1, len(known) + _CHUNK))
            part = self._packed[len(known) * step : end * step]
            known += block_hashes(part, self._block_size, known[-1] if known else self._seed)
        return known[index]


def depth_of(match: Match, slot: int) -> int:
    """Leading blocks that this slot holds."""
    for depth, mask in reversed(match):
        if mask >> slot & 1:
            return depth
    return 0


def deepest(match: Match, count: int, start: int) -> list[int]:
    """Up to `count` slots, the longest match first; equals from slot `start` on."""
    slots: list[int] = []
    seen = 0
    for _, mask in reversed(match):
        fresh = mask & ~seen
        seen = mask
        for part in (fresh >> start << start, fresh & ((1 << start) - 1)):
            rest = part
            while rest:
                if len(slots) == count:
                    return slots
                low = rest & -rest
                slots.append(low.bit_length() - 1)
                rest ^= low
    return slots


class _Holder:
    """What one slot holds and how far we have heard of it."""

    __slots__ = ("behind", "hashes", "held_back", "limit", "next_id", "tries", "waiting")

    def __init__(self, limit: int) -> None:
        self.hashes: set[bytes] = set()
        self.limit = limit
        """It cannot hold more than so many."""
        self.behind = 0
        """Reports in a row that knew of fewer events than we have heard of."""
        self.tries = 0
        """Snapshots in a row that were too old."""
        self.next_id: int | None = None
        """None until the first word: then nothing or a snapshot comes."""
        self.waiting = False
        """A snapshot was asked for; events are held back until it comes."""
        self.held_back: list[tuple[int, Sequence[KvEvent]]] = []


class PrefixIndex:
    """Bounded by `max_blocks` (block, worker) pairs."""

    def __init__(self, max_blocks: int) -> None:
        self._max = max_blocks
        self._masks: dict[bytes, int] = {}
        self._holders: dict[int, _Holder] = {}
        self._alive = 0
        self._free: list[int] = []
        self._num_slots = 0
        self._retired: deque[tuple[int, set[bytes]]] = deque()
        self.num_pairs = 0

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def join(self, num_blocks: int = sys.maxsize) -> int:
        """A slot for a worker that has nothing yet and can hold `num_blocks`: what it claims
        beyond that is not believed, so that it cannot push out what others hold."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._num_slots
            self._num_slots += 1
        self._holders[slot] = _Holder(num_blocks)
        self._alive |= 1 << slot
        return slot

    def leave(self, slot: int) -> None:
        holder = self._holders.pop(slot)
        self._alive &= ~(1 << slot)
        self._retired.append((slot, holder.hashes))
        self.sweep()

    def sweep(self, limit: int = _SWEEP) -> None:
        """Forget up to `limit` pairs of slots that left."""
        while self._retired and limit > 0:
            slot, hashes = self._retired[0]
            while hashes and limit > 0:
                self._drop_pair(hashes.pop(), slot)
                limit -= 1
            if not hashes:
                self._retired.popleft()
                self._free.append(slot)

    def match(self, hashes: Hashes) -> Match:
        """The depths at which holders drop out, in few looks."""
        found: Match = []
        size = len(hashes)
        if not size or not self._masks:
            return found
        mask = self._mask(hashes[0], self._alive)
        depth = 1
        while mask and len(found) < _MAX_CHANGES:
            last = self._last_equal(hashes, mask, depth - 1, size)
            found.append((last + 1, mask))
            if last + 1 >= size:
                break
            mask = self._mask(hashes[last + 1], mask)
            depth = last + 2
        return found

    def _mask(self, block: bytes, within: int) -> int:
        return self._masks.get(block, 0) & within

    def _last_equal(self, hashes: Hashes, mask: int, low: int, size: int) -> int:
        """The deepest block, from `low` (which has it) on, that all of `mask` hold."""
        step = 1
        while low + step < size and self._mask(hashes[low + step], mask) == mask:
            low += step
            step *= 2
        high = min(low + step, size)
        while high - low > 1:
            middle = (low + high) // 2
            if self._mask(hashes[middle], mask) == mask:
                low = middle
            else:
                high = middle
        return low

    def change(self, slot: int, first_id: int, events: Sequence[KvEvent]) -> bool:
        """Apply numbered events. True: something is missing, ask for a snapshot (once)."""
        self.sweep()
        holder = self._holders[slot]
        if holder.waiting:
            if len(holder.held_back) < _MAX_HELD_BACK:
                holder.held_back.append((first_id, events))
            return False
        if holder.next_id is None:
            holder.next_id = 1
        if first_id > holder.next_id:
            holder.waiting = True
            holder.held_back = [(first_id, events)]
            return True
        self._apply(slot, holder, first_id, events)
        return False

    def heard_last(self, slot: int, last_id: int) -> bool:
        """The worker's last event number. True: a tail was lost, or what we heard was nonsense;
        ask for a snapshot (once). A snapshot may overtake reports, so one that knows less than we
        do means nothing, and several in a row that our number is wrong."""
        holder = self._holders[slot]
        expected = holder.next_id or 1
        if holder.waiting:
            return False
        holder.behind = holder.behind + 1 if last_id + 1 < expected else 0
        if holder.behind >= _MAX_BEHIND:
            holder.behind = 0
            holder.next_id = None
        elif last_id < expected:
            return False
        holder.waiting = True
        return True

    def is_waiting(self, slot: int) -> bool:
        return self._holders[slot].waiting

    def replace(self, slot: int, last_id: int, hashes: Sequence[bytes]) -> bool:
        """A snapshot after event `last_id`. True: it is too old already, ask again."""
        holder = self._holders[slot]
        held_back = holder.held_back
        holder.held_back = []
        holder.waiting = False
        if holder.next_id is not None and last_id + 1 < holder.next_id:
            return False
        self._clear(slot, holder)
        for block in hashes:
            self._add_pair(block, slot, holder)
        holder.next_id = last_id + 1
        holder.tries += 1
        again = False
        for first_id, events in held_back:
            if first_id > holder.next_id and holder.tries >= _MAX_TRIES:
                continue  # no snapshot comes so far: nobody ever said what lies between
            again = self.change(slot, first_id, events) or again
        if not again:
            holder.tries = 0
        return again

    def _apply(self, slot: int, holder: _Holder, first_id: int, events: Sequence[KvEvent]) -> None:
        assert holder.next_id is not None
        for event in events[holder.next_id - first_id :]:
            holder.next_id += 1
            if isinstance(event, KvCleared):
                self._clear(slot, holder)
                continue
            hashes = event.hashes
            for start in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
                block = hashes[start : start + HASH_BYTES]
                if isinstance(event, KvStored):
                    self._add_pair(block, slot, holder)
                elif block in holder.hashes:
                    holder.hashes.discard(block)
                    self._drop_pair(block, slot)

    def _clear(self, slot: int, holder: _Holder) -> None:
        for block in holder.hashes:
            self._drop_pair(block, slot)
        holder.hashes = set()

    def _add_pair(self, block: bytes, slot: int, holder: _Holder) -> None:
        if block in holder.hashes or len(holder.hashes) >= holder.limit:
            return
        if self.num_pairs >= self._max:
            self._evict()
        holder.hashes.add(block)
        self._masks[block] = self._masks.get(block, 0) | 1 << slot
        self.num_pairs += 1

    def _drop_pair(self, block: bytes, slot: int) -> None:
        left = self._masks[block] & ~(1 << slot)
        if left:
            self._masks[block] = left
        else:
            del self._masks[block]
        self.num_pairs -= 1

    def _evict(self) -> None:
        """The oldest blocks go, many at once: a dict forgets its front only in bulk."""
        retired = dict(self._retired)
        for block in list(islice(self._masks, max(1, len(self._masks) // 64))):
            mask = self._masks.pop(block)
            while mask:
                low = mask & -mask
                mask ^= low
                slot = low.bit_length() - 1
                holder = self._holders.get(slot)
                (holder.hashes if holder else retired[slot]).discard(block)
                self.num_pairs -= 1

    def validate(self) -> None:
        """Raises LocalError unless masks and holders say the same."""
        pairs = [(slot, block) for slot, h in self._holders.items() for block in h.hashes]
        pairs += [(slot, block) for slot, hashes in self._retired for block in hashes]
        right = all(self._masks.get(block, 0) >> slot & 1 for slot, block in pairs)
        bits = sum(mask.bit_count() for mask in self._masks.values())
        if not right or bits != len(pairs) or bits != self.num_pairs or bits > self._max:
            raise LocalError(f"prefix index: {bits} bits, {len(pairs)} pairs, {self.num_pairs}")

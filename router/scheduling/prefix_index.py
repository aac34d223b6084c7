"""Who has which prefix cached: block hash -> integer bitmask of workers.

A prefix is matched by jumping: masks only lose bits with depth (a worker that evicts from the leaf
holds every block before one that it holds), so the points where they change are found by galloping
and bisection. What a worker evicted out of order is overcounted; that costs time, never truth.

It knows slots, not workers. The number of (block, worker) pairs is bounded, the oldest blocks go
first; a slot that was left is swept in small steps and reused only when no mask has its bit.

It is the largest thing that a router remembers. So a block is there once, as a piece of its hash
(`_KEY_MASK`), and a slot has no list of what it holds: when it lets go of everything, its bits are
declared stale, and go when somebody comes by. The masks are in several dicts (shards), because a
dict is copied whole after as many changes as it has room for: that takes the loop, and memory.
"""

import struct
import sys
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
_SWEEP: Final = 1024
_MAX_RETIRED: Final = 32
"""Slots that wait to be swept, before a snapshot sweeps them all: masks stay narrow."""
_CHUNK: Final = 64
_MAX_SHARDS: Final = 256
_MIN_SHARD: Final = 4096
"""Pairs; an index of fewer has one dict."""
_KEY_MASK: Final = (1 << 60) - 1
"""The last bits of a hash stand for its block: as many as an int of two digits has. Should two
blocks ever have one key, a request goes to a worker that has less of its prompt than we think."""
_LAST_HALVES: Final = struct.Struct(f">{HASH_BYTES - 8}xQ")

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


def _keys_of(hashes: bytes) -> list[int]:
    """Of blocks whose hashes are joined; what is left over is no hash."""
    rest = len(hashes) % HASH_BYTES
    whole = hashes[:-rest] if rest else hashes
    return [half & _KEY_MASK for (half,) in _LAST_HALVES.iter_unpack(whole)]


def _slots_of(mask: int) -> list[int]:
    slots = []
    while mask:
        low = mask & -mask
        slots.append(low.bit_length() - 1)
        mask ^= low
    return slots


class _Holder:
    """What one slot holds and how far we have heard of it."""

    __slots__ = ("behind", "bit", "count", "held_back", "limit", "next_id", "tries", "waiting")

    def __init__(self, limit: int) -> None:
        self.bit = 0
        """1 << slot. It is the mask of all blocks that nobody else holds: one int, not one each."""
        self.count = 0
        """Blocks that it holds."""
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
        self._num_shards = min(_MAX_SHARDS, max(1, max_blocks // _MIN_SHARD))
        self._shards: list[dict[int, int]] = [{} for _ in range(self._num_shards)]
        """Key -> mask, by the key's remainder."""
        self._stale: dict[int, int] = {}
        """Shard -> the slots whose bits in it mean nothing any more."""
        self._holders: dict[int, _Holder] = {}
        self._alive = 0
        self._free: list[int] = []
        self._num_slots = 0
        self._retired = 0
        """Slots that left and may have stale bits."""
        self.num_pairs = 0
        """Stale ones, too."""

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def join(self, num_blocks: int = sys.maxsize) -> int:
        """A slot for a worker that has nothing yet and can hold `num_blocks`: what it claims
        beyond that is not believed, so that it cannot push out what others hold."""
        return self._seat(_Holder(num_blocks))

    def leave(self, slot: int) -> None:
        self._unseat(slot)
        self.sweep()

    def _seat(self, holder: _Holder) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._num_slots
            self._num_slots += 1
        holder.bit = 1 << slot
        self._holders[slot] = holder
        self._alive |= holder.bit
        return slot

    def _unseat(self, slot: int) -> _Holder:
        holder = self._holders.pop(slot)
        self._let_go(holder)
        self._alive &= ~holder.bit
        self._retired |= holder.bit
        return holder

    def sweep(self, limit: int = _SWEEP) -> None:
        """Look through `limit` blocks or a little more for stale bits. Slots that left and have no
        more of them may be used again."""
        while self._stale and limit > 0:
            number = next(iter(self._stale))
            limit -= len(self._shards[number])
            self._wash(number)
        if self._retired:
            waiting = 0
            for stale in self._stale.values():
                waiting |= stale
            self._free += _slots_of(self._retired & ~waiting)
            self._retired &= waiting

    def match(self, hashes: Hashes) -> Match:
        """The depths at which holders drop out, in few looks."""
        found: Match = []
        size = len(hashes)
        if not size or not self.num_pairs:
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
        key = int.from_bytes(block, "big") & _KEY_MASK
        number = key % self._num_shards
        mask = self._shards[number].get(key, 0) & within
        return mask & ~self._stale.get(number, 0) if self._stale else mask

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
        self._apply(holder, first_id, events)
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

    def replace(self, slot: int, last_id: int, hashes: Sequence[bytes]) -> tuple[int, bool]:
        """A snapshot after event `last_id`. The slot from now on: another one if it held something,
        for that would be dear to find. And True: the snapshot is too old already, ask again."""
        holder = self._holders[slot]
        held_back = holder.held_back
        holder.held_back = []
        holder.waiting = False
        if holder.next_id is not None and last_id + 1 < holder.next_id:
            return slot, False
        if holder.count:
            if self._retired.bit_count() >= _MAX_RETIRED:
                self.sweep(sys.maxsize)
            slot = self._seat(self._unseat(slot))
        for key in _keys_of(b"".join(hashes)):
            self._add_pair(key, holder)
        holder.next_id = last_id + 1
        holder.tries += 1
        again = False
        for first_id, events in held_back:
            if first_id > holder.next_id and holder.tries >= _MAX_TRIES:
                continue  # no snapshot comes so far: nobody ever said what lies between
            again = self.change(slot, first_id, events) or again
        if not again:
            holder.tries = 0
        return slot, again

    def _apply(self, holder: _Holder, first_id: int, events: Sequence[KvEvent]) -> None:
        assert holder.next_id is not None
        for event in events[holder.next_id - first_id :]:
            holder.next_id += 1
            if isinstance(event, KvCleared):
                self._let_go(holder)
                continue
            keys = _keys_of(event.hashes)
            if isinstance(event, KvStored):
                for key in keys:
                    self._add_pair(key, holder)
                continue
            for key in keys:
                self._drop_pair(key, holder)

    def _let_go(self, holder: _Holder) -> None:
        """Of all that it holds."""
        if not holder.count:
            return
        holder.count = 0
        for number, masks in enumerate(self._shards):
            if masks:
                self._stale[number] = self._stale.get(number, 0) | holder.bit

    def _wash(self, number: int) -> None:
        """Take the stale bits out of one shard."""
        masks = self._shards[number]
        stale = self._stale.pop(number)
        for key in [key for key, mask in masks.items() if mask & stale]:
            mask = masks[key]
            self.num_pairs -= (mask & stale).bit_count()
            if mask & ~stale:
                masks[key] = mask & ~stale
            else:
                del masks[key]

    def _add_pair(self, key: int, holder: _Holder) -> None:
        number = key % self._num_shards
        masks = self._shards[number]
        bit = holder.bit
        if self._stale and self._stale.get(number, 0) & bit:
            self._wash(number)
        if masks.get(key, 0) & bit or holder.count >= holder.limit:
            return
        while self.num_pairs >= self._max:
            if self._stale:
                self.sweep()
            else:
                self._evict(masks or max(self._shards, key=len))
        mask = masks.get(key)
        masks[key] = mask | bit if mask else bit
        holder.count += 1
        self.num_pairs += 1

    def _drop_pair(self, key: int, holder: _Holder) -> None:
        """If it holds that."""
        number = key % self._num_shards
        masks = self._shards[number]
        mask = masks.get(key, 0)
        bit = holder.bit
        if not mask & bit or (self._stale and self._stale.get(number, 0) & bit):
            return
        if mask == bit:
            del masks[key]
        else:
            masks[key] = mask ^ bit
        holder.count -= 1
        self.num_pairs -= 1

    def _evict(self, masks: dict[int, int]) -> None:
        """The oldest blocks of a shard go, many at once: a dict forgets its front only in bulk. No
        bit is stale now."""
        for key in list(islice(masks, max(1, len(masks) // 64))):
            slots = _slots_of(masks.pop(key))
            for slot in slots:
                self._holders[slot].count -= 1
            self.num_pairs -= len(slots)

    def validate(self) -> None:
        """Raises LocalError unless masks and holders say the same."""
        held = dict.fromkeys(self._holders, 0)
        bits = 0
        for number, masks in enumerate(self._shards):
            for mask in masks.values():
                bits += mask.bit_count()
                for slot in _slots_of(mask & ~self._stale.get(number, 0)):
                    held[slot] = held.get(slot, 0) + 1
        counted = {slot: holder.count for slot, holder in self._holders.items()}
        if held != counted or bits != self.num_pairs or bits > self._max:
            raise LocalError(f"prefix index: {bits} bits, {self.num_pairs}; {held}, {counted}")

"""From vLLM's block hashes to ours: what its prefix cache holds, in the words of our KV events.

vLLM chains its own hashes; ours are computed again from the token ids that its events carry, so
that a router compares them with those of other engines. A block whose parent we never saw cannot be
placed and is left out, as are blocks of adapters, images and salts: an index may know too little,
never too much. Pure; it knows no sockets.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from protocol.blocks import block_hashes, pack_ids
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored

_MEDIA: Final = (None, "GPU")
_GROUPS: Final = (None, 0)
MAX_SEQ: Final = 1 << 62
"""Believed, a larger one would make everything after it a repeat."""

VllmHash = int | bytes


class BlockStored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[VllmHash]
    token_ids: list[int]
    block_size: int
    parent_block_hash: VllmHash | None = None
    lora_id: int | None = None
    lora_name: str | None = None
    medium: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[VllmHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    dp_rank: int | None = None


_batches: Final = msgspec.msgpack.Decoder(EventBatch)


def decode_batch(payload: bytes) -> EventBatch:
    """Raises ValueError."""
    try:
        return _batches.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"KV events cannot be read: {error}") from None


class KvIndex:
    """The cache of one vLLM. `seed` is the chained hash before the first block."""

    def __init__(self, *, block_size: int, seed: bytes, max_blocks: int) -> None:
        self._block_size = block_size
        self._seed = seed
        self._max_blocks = max_blocks
        self._ours: dict[VllmHash, tuple[bytes, int]] = {}
        """Our hash, and how often vLLM has stored the block: it may compute one twice."""
        self._cached: dict[bytes, int] = {}
        """How many of vLLM's names each of our hashes has."""

    def __len__(self) -> int:
        return len(self._cached)

    @property
    def hashes(self) -> list[bytes]:
        return list(self._cached)

    def apply(self, batch: EventBatch) -> list[KvEvent]:
        """What changed, for routers."""
        said: list[KvEvent] = []
        if batch.dp_rank:  # another rank has a cache of its own, which no request can be sent to
            return said
        for event in batch.events:
            match event:
                case BlockStored():
                    new, gone = self._store(event)
                    if gone:
                        said.append(KvRemoved(b"".join(gone)))
                    if new:
                        said.append(KvStored(b"".join(new)))
                case BlockRemoved():
                    gone = self._remove(event)
                    if gone:
                        said.append(KvRemoved(b"".join(gone)))
                case AllBlocksCleared():
                    said += self.clear()
        if len(self._ours) > self._max_blocks:  # more than vLLM has: we lost count
            return [*said, *self.clear()]
        return said

    def clear(self) -> list[KvEvent]:
        self._ours.clear()
        self._cached.clear()
        return [KvCleared()]

    def _store(self, event: BlockStored) -> tuple[list[bytes], list[bytes]]:
        """What is cached now, and what is not any more: a name that vLLM gives to other tokens
        than before does not stand for those."""
        new: list[bytes] = []
        gone: list[bytes] = []
        parent = self._parent_of(event)
        if parent is None:
            return new, gone
        hashes = block_hashes(pack_ids(event.token_ids), self._block_size, parent)
        for theirs, ours in zip(event.block_hashes, hashes, strict=False):
            before, count = self._ours.get(theirs, (ours, 0))
            if before != ours:
                gone += self._unname(before)
                count = 0
            self._ours[theirs] = (ours, count + 1)
            if not count:
                names = self._cached.get(ours, 0)
                self._cached[ours] = names + 1
                if not names:
                    new.append(ours)
        return new, [block for block in gone if block not in self._cached]

    def _parent_of(self, event: BlockStored) -> bytes | None:
        """None for what cannot be placed."""
        if not self._is_plain(event):
            return None
        if event.parent_block_hash is None:
            return self._seed
        known = self._ours.get(event.parent_block_hash)
        return None if known is None else known[0]

    def _unname(self, ours: bytes) -> list[bytes]:
        """One name less; the block itself if that was the last."""
        names = self._cached.get(ours, 0)
        if names > 1:
            self._cached[ours] = names - 1
            return []
        return [ours] if self._cached.pop(ours, 0) else []

    def _is_plain(self, event: BlockStored) -> bool:
        return (
            event.block_size == self._block_size
            and len(event.token_ids) == len(event.block_hashes) * self._block_size
            and event.medium in _MEDIA
            and event.group_idx in _GROUPS
            and event.lora_id is None
            and event.lora_name is None
            and not any(event.extra_keys or ())
        )

    def _remove(self, event: BlockRemoved) -> list[bytes]:
        if event.medium not in _MEDIA or event.group_idx not in _GROUPS:
            return []
        gone = []
        for theirs in event.block_hashes:
            ours, count = self._ours.get(theirs, (b"", 0))
            if count > 1:
                self._ours[theirs] = (ours, count - 1)
            elif count:
                del self._ours[theirs]
                gone += self._unname(ours)
        return gone


def read_frames(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """Number and payload; None for what has none. The end of a replay is a number that no message
    has, and so is every other that a publisher cannot have come to by counting."""
    if len(frames) != 2 or len(frames[0]) != 8:
        return None
    seq = int.from_bytes(frames[0], "big")
    return None if seq > MAX_SEQ else (seq, frames[1])


class Sequencer:
    """Which numbered messages may be applied, and what is missing before them."""

    def __init__(self) -> None:
        self.expected = 0

    def missing(self, seq: int) -> bool:
        """Something between the last message and this one was lost."""
        return seq > self.expected

    def take(self, seq: int) -> bool:
        """False for a repeat."""
        if seq < self.expected:
            return False
        self.expected = seq + 1
        return True


def replay_closes_gap(replayed: Sequence[tuple[int, bytes]], expected: int, before: int) -> bool:
    """Whether every number from `expected` to the one `before` the next message is there."""
    for seq, _ in replayed:
        if seq > expected:
            return False
        expected = max(expected, seq + 1)
    return expected >= before

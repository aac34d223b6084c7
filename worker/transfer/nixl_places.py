"""From block numbers to places in memory, as NIXL wants them. Pure; knows no library."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from protocol.handoff import FabricOffer
from worker.kv.arena import TOKEN_BYTES, WORD_BYTES, Arena, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.operations import out_of_range, runs

PIECE_BYTES: Final = 8 << 20
"""A pull goes in pieces of at most this many bytes (or one block, if that is larger)."""
MAX_METADATA_BYTES: Final = 1 << 20
"""A source registers two regions, which takes half a KiB."""
MAX_NAME: Final = 256
_THROTTLE_S: Final = 0.05
"""A throttled pull copies at most so much of its time at once."""

Place = tuple[int, int, int]
"""Address, bytes, device."""
Kind = Literal["DRAM", "VRAM"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Copies that are posted and end together: `remote[i]` into `local[i]`."""

    remote: list[Place]
    local: list[Place]
    num_bytes: int
    """Of blocks: a word does not count."""
    remote_kind: Kind = "DRAM"
    local_kind: Kind = "DRAM"


def memory_kind(kind: str) -> Kind:
    return "VRAM" if kind == "cuda" else "DRAM"


def wrong_memory(offer: FabricOffer) -> str:
    """Why there can be no such source or memory; empty if there can. Whether it is there, the
    library knows."""
    if len(offer.agent) > MAX_NAME:
        return f"an agent's name of {len(offer.agent)} characters"
    if len(offer.metadata) > MAX_METADATA_BYTES:
        return f"metadata of {len(offer.metadata)} bytes"
    regions = (offer.arena_address, offer.arena_bytes), (offer.lease_address, offer.lease_bytes)
    if not all(0 < address <= address + nbytes < 1 << 63 for address, nbytes in regions):
        return "memory at no address"
    if not 0 <= offer.device < 1 << 31:
        return f"memory of device {offer.device}"
    return ""


def wrong_remote(spec: PullSpec, offer: FabricOffer) -> str:
    """Why these blocks are not the source's; empty if they are."""
    if out_of_range(spec.remote, offer.arena_bytes // spec.block_bytes):
        return "a remote block outside of the source's arena"
    return ""


def wrong_slot(spec: PullSpec, offer: FabricOffer) -> str:
    """Why this slot is not the source's; empty if it is."""
    if not 0 <= spec.slot < (offer.lease_bytes - TOKEN_BYTES) // WORD_BYTES:
        return "a slot outside of the source's lease table"
    return ""


def block_pieces(
    spec: PullSpec, offer: FabricOffer, arena: Arena, *, pace: float
) -> Iterator[Piece]:
    """`pace`: bytes per second at most; 0: no bound."""
    size = spec.block_bytes
    piece_bytes = min(PIECE_BYTES, pace * _THROTTLE_S) if pace else PIECE_BYTES
    num_blocks = max(1, int(piece_bytes // size))
    kinds = memory_kind(offer.kind), memory_kind(arena.kind)
    for start in range(0, len(spec.local), num_blocks):
        part = slice(start, start + num_blocks)
        copies = list(runs(spec.remote[part], spec.local[part], num_blocks))
        yield Piece(
            [(offer.arena_address + r * size, n * size, offer.device) for r, _, n in copies],
            [(arena.address + mine * size, n * size, arena.device) for _, mine, n in copies],
            sum(n for _, _, n in copies) * size,
            *kinds,
        )


def word_piece(slot: int, offer: FabricOffer, scratch: ScratchWords, scratch_slot: int) -> Piece:
    """The lease word: 8 bytes, in the host's memory on both sides."""
    return Piece(
        [(offer.lease_address + slot * WORD_BYTES, WORD_BYTES, 0)],
        [(scratch.address + scratch_slot * WORD_BYTES, WORD_BYTES, 0)],
        num_bytes=0,
    )

"""Chained block hashes: the identity of KV.

The hash of a block covers its own token ids and, through its parent's hash, everything before it,
seeded with the model digest: equal hashes mean equal tokens at equal positions under an equal
model. 128 bits: prefix-cache hits are taken on the hash alone, so a collision must not be findable
by chance.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 16
_TAIL: Final = b"tail"


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as consecutive unsigned 32-bit little-endian integers."""
    packed = array("I", ids)
    return packed.tobytes()


def unpack_ids(packed: bytes) -> "array[int]":
    """The inverse of `pack_ids`. Raises ValueError if the length is not a multiple of four."""
    ids = array("I")
    ids.frombytes(packed)
    return ids


def seed_of(model_digest: str, cache_salt: str = "") -> bytes:
    """The hash before the first block: KV of another model or salt never matches."""
    return blake2b(
        model_digest.encode() + b"\0" + cache_salt.encode(), digest_size=HASH_BYTES
    ).digest()


def block_hashes(packed: bytes, block_size: int, seed: bytes) -> list[bytes]:
    """One 16-byte hash for each full block of `packed` ids."""
    step = block_size * 4
    parent = seed
    hashes = []
    for start in range(0, len(packed) - step + 1, step):
        parent = blake2b(parent + packed[start : start + step], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def content_hash(packed: bytes, block_size: int, seed: bytes) -> bytes:
    """One hash of all of `packed`, the unfilled last block included."""
    hashes = block_hashes(packed, block_size, seed)
    return content_hash_from(hashes, packed, block_size, seed)


def content_hash_from(
    hashes: Sequence[bytes], packed: bytes, block_size: int, seed: bytes
) -> bytes:
    """As `content_hash`, when the hashes of the full blocks are known already."""
    parent = hashes[-1] if hashes else seed
    tail = packed[len(hashes) * block_size * 4 :]
    return blake2b(parent + _TAIL + tail, digest_size=HASH_BYTES).digest()

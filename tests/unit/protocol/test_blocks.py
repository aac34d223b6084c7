"""Chained hashes against a naive computation, and the properties that hand-offs rest on."""

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.blocks import (
    HASH_BYTES,
    block_hashes,
    content_hash,
    content_hash_from,
    pack_ids,
    seed_of,
    unpack_ids,
)

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
SIZES = st.integers(1, 8)


def naive_chain(ids: list[int], block_size: int, seed: bytes) -> list[bytes]:
    chain = [seed]
    for number in range(len(ids) // block_size):
        block = ids[number * block_size : (number + 1) * block_size]
        data = chain[-1] + b"".join(struct.pack("<I", i) for i in block)
        chain.append(blake2b(data, digest_size=16).digest())
    return chain[1:]


@given(IDS, SIZES)
def test_hashes_are_the_naive_chain(ids: list[int], block_size: int) -> None:
    seed = seed_of("model")
    hashes = block_hashes(pack_ids(ids), block_size, seed)
    assert hashes == naive_chain(ids, block_size, seed)
    assert all(len(h) == HASH_BYTES for h in hashes)


@given(IDS)
def test_ids_survive_packing(ids: list[int]) -> None:
    packed = pack_ids(ids)
    assert packed == b"".join(struct.pack("<I", i) for i in ids)
    assert list(unpack_ids(packed)) == ids


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_ids_beyond_32_bits_are_refused(wrong: int) -> None:
    with pytest.raises(OverflowError):
        pack_ids([wrong])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_bytes_that_are_no_ids_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(bytes(length))


@given(IDS, IDS, SIZES)
def test_equal_prefixes_have_equal_hashes(head: list[int], tail: list[int], size: int) -> None:
    seed = seed_of("model")
    short, long = (
        block_hashes(pack_ids(head), size, seed),
        block_hashes(pack_ids(head + tail), size, seed),
    )
    assert long[: len(short)] == short


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), SIZES, st.data())
def test_one_changed_id_changes_its_block_and_all_after(
    ids: list[int], size: int, data: st.DataObject
) -> None:
    seed, at = seed_of("model"), data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:at], ids[at] + 1, *ids[at + 1 :]]
    mine, theirs = (block_hashes(pack_ids(x), size, seed) for x in (ids, other))
    same = at // size
    assert mine[:same] == theirs[:same]
    assert not set(mine[same:]) & set(theirs[same:])
    assert content_hash(pack_ids(ids), size, seed) != content_hash(pack_ids(other), size, seed)


def test_model_and_salt_make_the_seed() -> None:
    seeds = {seed_of("m"), seed_of("n"), seed_of("m", "s"), seed_of("ms"), seed_of("m\0s")}
    assert len(seeds) == 5
    assert seed_of("m") == seed_of("m", "")


@given(IDS.filter(bool), SIZES)
def test_another_seed_shares_no_hash(ids: list[int], size: int) -> None:
    one, two = seed_of("one"), seed_of("two")
    packed = pack_ids(ids)
    assert not set(block_hashes(packed, size, one)) & set(block_hashes(packed, size, two))
    assert content_hash(packed, size, one) != content_hash(packed, size, two)


@given(IDS, st.integers(0, 2**32 - 1), SIZES)
def test_content_hash_tells_every_length_apart(ids: list[int], more: int, size: int) -> None:
    seed = seed_of("m")
    packed, longer = pack_ids(ids), pack_ids([*ids, more])
    assert content_hash(packed, size, seed) != content_hash(longer, size, seed)
    assert content_hash(packed, size, seed) not in block_hashes(longer, size, seed)


@given(IDS, SIZES)
def test_content_hash_can_start_from_known_hashes(ids: list[int], size: int) -> None:
    seed, packed = seed_of("m"), pack_ids(ids)
    known = block_hashes(packed, size, seed)
    assert content_hash_from(known, packed, size, seed) == content_hash(packed, size, seed)
    parent = known[-1] if known else seed
    tail = packed[len(known) * size * 4 :]
    naive = blake2b(parent + b"tail" + tail, digest_size=16).digest()
    assert content_hash(packed, size, seed) == naive

"""Shareable memory: addresses, bounds, words, and closing with views still alive."""

import ctypes
import os

import pytest

from protocol.errors import ConfigError, LocalError
from worker.kv.arena import TOKEN_BYTES, Arena, LeaseTable, ScratchWords


def test_blocks_are_consecutive_pieces_of_one_zeroed_memory() -> None:
    arena = Arena(4, 96)
    assert arena.nbytes == len(arena.memory) == 384
    assert bytes(arena.memory) == bytes(384)
    for index in range(4):
        arena.block(index)[:] = bytes([index + 1]) * 96
    assert bytes(arena.memory) == b"".join(bytes([n]) * 96 for n in (1, 2, 3, 4))
    assert ctypes.string_at(arena.address, 384) == bytes(arena.memory)
    arena.close()


def test_other_openers_of_the_file_see_what_is_written() -> None:
    arena = Arena(1, 64)
    arena.block(0)[:4] = b"abcd"
    with open(f"/proc/self/fd/{arena.fd}", "rb") as other:
        assert other.read(4) == b"abcd"
    arena.close()


def test_nobody_can_make_the_memory_smaller_under_a_reader() -> None:
    arena = Arena(2, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096)
    arena.close()


@pytest.mark.parametrize("index", [-1, 4, 10**12])
def test_block_outside_of_the_arena(index: int) -> None:
    arena = Arena(4, 64)
    with pytest.raises(LocalError):
        arena.block(index)
    arena.close()


def test_close_twice_and_with_a_view_that_is_still_alive() -> None:
    arena = Arena(2, 4096)
    view = arena.block(1)
    fd = arena.fd
    arena.close()
    arena.close()
    assert arena.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    view[0] = 1  # a tensor over the arena does not fault
    assert view[0] == 1
    with pytest.raises(ValueError, match="released"):
        arena.block(0)


def test_nothing_is_leaked_by_many_arenas() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        arena, leases = Arena(4, 4096), LeaseTable(4)
        arena.close()
        leases.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_memory_than_there_is_is_a_configuration_error() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="baton-arena"):
        Arena(2**50, 2**20)
    with pytest.raises(ConfigError, match="baton-arena"):
        Arena(2**32, 2**20)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("sizes", [(0, 64), (4, 0), (-1, 64)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(LocalError):
        Arena(*sizes)
    with pytest.raises(LocalError):
        LeaseTable(min(sizes))
    with pytest.raises(LocalError):
        ScratchWords(min(sizes))


def test_words_are_aligned_little_endian_and_apart() -> None:
    leases = LeaseTable(3)
    leases.write(0, 1)
    leases.write(1, 2**64 - 1)
    leases.write(2, 0x0102030405060708)
    assert [leases.read(slot) for slot in range(3)] == [1, 2**64 - 1, 0x0102030405060708]
    assert leases.address % 8 == 0
    assert ctypes.c_uint64.from_address(leases.address + 16).value == 0x0102030405060708
    leases.zero(1)
    assert [leases.read(slot) for slot in range(3)] == [1, 0, 0x0102030405060708]
    leases.close()


def test_token_lies_behind_the_words_and_is_each_tables_own() -> None:
    tables = [LeaseTable(5), LeaseTable(5)]
    for table in tables:
        for slot in range(5):
            table.write(slot, 2**64 - 1)
        assert bytes(table.memory[-TOKEN_BYTES:]).decode() == table.token
        assert table.nbytes == 5 * 8 + TOKEN_BYTES
    assert tables[0].token != tables[1].token
    for table in tables:
        table.close()


def test_wrong_slots_and_words_change_nothing() -> None:
    leases = LeaseTable(2)
    leases.write(0, 7)
    for slot, word in [(2, 1), (-1, 1), (0, -1), (0, 2**64)]:
        with pytest.raises(LocalError):
            leases.write(slot, word)
    assert [leases.read(0), leases.read(1)] == [7, 0]
    assert bytes(leases.memory[-TOKEN_BYTES:]).decode() == leases.token
    leases.close()
    with pytest.raises(LocalError, match="closed"):
        leases.read(0)


def test_scratch_words_are_read_where_a_transport_wrote_them() -> None:
    scratch = ScratchWords(2)
    ctypes.c_uint64.from_address(scratch.address + 8).value = 2**63
    assert scratch.read(1) == 2**63
    scratch.zero(1)
    assert scratch.read(1) == 0
    with pytest.raises(LocalError):
        scratch.read(2)


def test_without_memfd_an_unlinked_file_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    arena = Arena(2, 4096)
    assert "deleted" in os.readlink(f"/proc/self/fd/{arena.fd}")
    arena.block(1)[:] = b"y" * 4096
    assert os.pread(arena.fd, 2, 4095) == b"\0y"
    arena.close()

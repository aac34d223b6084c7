"""What only `shm` promises: a dead source's memory is let go, and pids are not trusted."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.handoff import ShmOffer
from tests.contract.transfer_sink import PeerProcess, Sink, until
from worker.transfer import shm_map
from worker.transfer.shm import ShmTransfer
from worker.transfer.shm_map import SourceGone, SourceMap, SourceMaps


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(ShmTransfer())
    yield sink
    assert sink.close()


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    peer = PeerProcess("shm")
    peer.ask("lend", slot=1, nonce=77)
    yield peer
    peer.close()


def offer_of(peer: PeerProcess) -> ShmOffer:
    assert isinstance(peer.offer, ShmOffer)
    return peer.offer


def test_memory_of_a_dead_source_is_unmapped_soon(sink: Sink, peer: PeerProcess) -> None:
    transfer = sink.transfer
    assert isinstance(transfer, ShmTransfer)
    assert sink.pull(sink.spec(peer.offer, [1])).ok
    assert transfer.num_mapped == 1
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().count("baton-arena")
    peer.kill()
    until(lambda: maps.read_text().count("baton-arena") == mapped - 1)
    assert transfer.num_mapped == 0
    end = sink.pull(sink.spec(peer.offer, [1]))
    assert (end.ok, end.peer_gone) == (False, True)


def test_a_source_is_mapped_once_and_never_unmapped_in_use(peer: PeerProcess) -> None:
    maps = SourceMaps(max_sources=1)
    offer = offer_of(peer)
    first = maps.acquire(offer)
    assert maps.acquire(offer) is first
    peer.kill()
    maps.sweep(0.0)
    maps.sweep(100.0)
    assert first.word(1) == 77
    maps.release(first)
    maps.sweep(100.0)
    assert len(maps) == 1, "one more pull holds it"
    maps.release(first)
    maps.sweep(100.0)
    assert len(maps) == 1, "found gone just now"
    maps.sweep(103.0)
    assert len(maps) == 0
    with pytest.raises(SourceGone):
        maps.acquire(offer)


def test_least_recently_used_mapping_makes_room(peer: PeerProcess) -> None:
    others = [PeerProcess("shm"), PeerProcess("shm")]
    maps = SourceMaps(max_sources=2)
    offers = [offer_of(peer), *map(offer_of, others)]
    held = maps.acquire(offers[0])
    for offer in offers[1:]:
        maps.release(maps.acquire(offer))
    assert len(maps) == 2
    assert maps.acquire(offers[0]) is held
    maps.release(held)
    maps.release(held)
    maps.clear()
    assert len(maps) == 0
    for other in others:
        other.close()


def test_unmapping_keeps_nobody_waiting(peer: PeerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long for much memory. Whoever asks for a mapping never does it, nor waits for it."""
    other = PeerProcess("shm")
    maps = SourceMaps(max_sources=1)
    unmap, locked = shm_map._unmap, []

    def look(address: int, nbytes: int) -> None:
        locked.append(maps._lock.locked())
        unmap(address, nbytes)

    monkeypatch.setattr(shm_map, "_unmap", look)
    maps.release(maps.acquire(offer_of(peer)))
    maps.release(maps.acquire(offer_of(other)))
    assert (len(maps), locked) == (1, [])
    maps.sweep(0.0)
    assert locked == [False] * 2
    other.close()
    maps.sweep(0.0)
    maps.sweep(100.0)
    assert (len(maps), locked) == (0, [False] * 4)
    maps.release(maps.acquire(offer_of(peer)))
    maps.clear()
    assert (len(maps), locked) == (0, [False] * 6)


def test_source_that_cannot_be_mapped_for_an_unforeseen_reason_ends_the_pull(
    sink: Sink, peer: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(maps: SourceMaps, offer: ShmOffer) -> SourceMap:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SourceMaps, "acquire", fail)
        for _ in range(3):  # more than there are threads
            end = sink.pull(sink.spec(peer.offer, [1]))
            assert (end.ok, end.peer_gone, end.reason.split(":")[0]) == (False, False, "internal")
        assert sink.word(sink.spec(peer.offer, [], slot=1)) is None
    assert sink.transfer.num_live() == 0
    assert sink.pull(sink.spec(peer.offer, [1])).ok


def test_recycled_pid_is_another_process_whatever_it_has_open(
    sink: Sink, peer: PeerProcess
) -> None:
    offer = offer_of(peer)
    mine = sink.transfer.offer()
    assert isinstance(mine, ShmOffer)
    pipe_read, pipe_write = os.pipe()
    with open("/dev/null") as device:
        numbers = [
            (mine.arena_fd, mine.lease_fd),  # all as it should be, but for the token
            (mine.arena_fd, pipe_read),
            (device.fileno(), mine.lease_fd),
            (mine.arena_fd, 999_999),
            (mine.lease_fd, mine.lease_fd),  # too small to be the arena
        ]
        for arena_fd, lease_fd in numbers:
            recycled = ShmOffer(
                offer.boot_id, os.getpid(), arena_fd, lease_fd, offer.arena_bytes,
                min(offer.lease_bytes, 40), offer.token,
            )  # fmt: skip
            begun = time.monotonic()
            end = sink.pull(sink.spec(recycled, [1]))
            assert (end.ok, end.peer_gone) == (False, True), (arena_fd, lease_fd)
            assert time.monotonic() - begun < 2.0
    os.close(pipe_read)
    os.close(pipe_write)
    assert sink.is_untouched(range(64))


def test_word_outside_of_the_table_is_not_read(sink: Sink, peer: PeerProcess) -> None:
    assert sink.word(sink.spec(peer.offer, [], slot=7)) == 0
    assert sink.word(sink.spec(peer.offer, [], slot=8)) is None
    assert sink.word(sink.spec(peer.offer, [], slot=-1)) is None


def test_pull_from_ourselves(sink: Sink) -> None:
    sink.leases.write(0, 5)
    sink.arena.block(3)[:] = b"x" * 65536
    spec = sink.spec(sink.transfer.offer(), [3], [4], slot=0, nonce=5)
    assert sink.pull(spec).ok
    assert sink.word(spec) == 5
    assert bytes(sink.arena.block(4)) == b"x" * 65536

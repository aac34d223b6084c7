"""A fabric's offer is taken only where the pair has a fast way, tried on real processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, Offer, TcpOffer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PassedOver, PullSpec, PullTicket
from worker.transfer.fabric_pairs import MAX_REMEMBERED, FabricPairs
from worker.transfer.probe import read_foreign
from worker.transfer.shm import host_id

ROOT = Path(__file__).parents[3]
SOURCE = """
import os, sys
from worker.kv.arena import LeaseTable
table = LeaseTable(4)
print(os.getpid(), table.address, table.nbytes, table.token, flush=True)
sys.stdin.read()
"""


class Fabric:
    """A library whose offers are all alike."""

    name = "nixl"

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        if self.fails:
            raise ConfigError(self.fails)

    def offer(self) -> Offer:
        return FabricOffer("nixl/UCX", "w.1", b"meta", 4096, 8192, lease_bytes=64)

    def refuse(self, offer: Offer) -> str:
        return "" if isinstance(offer, FabricOffer) else "not an offer of nixl"

    def pull(self, spec: PullSpec, on_end: OnEnd) -> PullTicket:
        raise NotImplementedError

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        raise NotImplementedError

    def num_live(self) -> int:
        return 3

    def stop(self) -> bool:
        return False


class Reads:
    """Real reads, counted, or what the test says instead."""

    def __init__(self, instead: "Callable[[], bytes] | None" = None) -> None:
        self.count = 0
        self._instead = instead

    def __call__(self, pid: int, address: int, nbytes: int) -> bytes:
        self.count += 1
        return self._instead() if self._instead else read_foreign(pid, address, nbytes)


def pairs(
    read: Reads | None = None,
    *,
    picky: bool = True,
    has_rdma: bool = False,
    lacks_cma: str = "",
    inner: Fabric | None = None,
) -> FabricPairs:
    return FabricPairs(
        inner or Fabric(),
        picky=picky,
        has_rdma=has_rdma,
        lacks_cma=lacks_cma,
        host_id=host_id(),
        read=read or Reads(),
    )


OFFER = FabricOffer(
    "nixl/UCX", "p.1", b"meta", 4096, 8192, host_id=host_id(), pid=1, lease_bytes=64, token="t" * 32
)
ELSEWHERE = msgspec.structs.replace(OFFER, host_id="another-boot/1")


def denied() -> bytes:
    raise PermissionError(1, "Operation not permitted")


def test_a_source_whose_word_was_read_is_taken_and_asked_once() -> None:
    reads = Reads()
    with subprocess.Popen(
        [sys.executable, "-c", SOURCE],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid, address, nbytes, token = process.stdout.readline().split()
        offer = msgspec.structs.replace(
            OFFER, pid=int(pid), lease_address=int(address), lease_bytes=int(nbytes), token=token
        )
        wrong = msgspec.structs.replace(offer, agent="p.2", token="0" * 32)
        ours = pairs(reads)
        assert [ours.refuse(offer), ours.refuse(offer)] == ["", ""]
        assert reads.count == 1
        assert ours.refuse(wrong) == "tried CMA: another process's memory"
        process.communicate()
    gone = msgspec.structs.replace(offer, agent="p.3")
    assert pairs().refuse(gone) == "", "a dead source is the pull's to report"


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (OFFER, "tried CMA: Operation not permitted"),
        (ELSEWHERE, "no RDMA, and the source is on another host or in another pid namespace"),
        (msgspec.structs.replace(OFFER, token=""), "CMA does not work at the source"),
        (msgspec.structs.replace(OFFER, pid=0), "an offer of nothing"),
        (msgspec.structs.replace(OFFER, lease_address=-(2**62)), "an offer of nothing"),
        (msgspec.structs.replace(ELSEWHERE, kind="cuda"), ""),
        (TcpOffer("192.0.2.1", 1), "not an offer of nixl"),
    ],
)
def test_slow_ways_are_refused_by_name(offer: Offer, reason: str) -> None:
    assert pairs(Reads(denied)).refuse(offer) == reason


def test_rdma_must_be_at_both_ends() -> None:
    with_rdma = msgspec.structs.replace(ELSEWHERE, rdma=True)
    assert pairs(has_rdma=True).refuse(with_rdma) == ""
    assert pairs(has_rdma=False).refuse(with_rdma) != ""
    assert pairs(has_rdma=True).refuse(ELSEWHERE) != ""


def test_without_cma_here_nothing_is_read() -> None:
    reads = Reads()
    assert pairs(reads, lacks_cma="filtered").refuse(OFFER) == "CMA does not work here: filtered"
    assert reads.count == 0


def test_what_was_asked_for_by_name_is_not_probed() -> None:
    reads = Reads(denied)
    ours = pairs(reads, picky=False, lacks_cma="filtered")
    assert [ours.refuse(OFFER), ours.refuse(ELSEWHERE)] == ["", ""]
    assert reads.count == 0


def test_only_so_many_answers_are_remembered() -> None:
    reads = Reads(denied)
    ours = pairs(reads)
    for number in range(MAX_REMEMBERED + 1):
        ours.refuse(msgspec.structs.replace(OFFER, agent=f"p.{number}"))
    ours.refuse(msgspec.structs.replace(OFFER, agent=f"p.{MAX_REMEMBERED}"))
    assert reads.count == MAX_REMEMBERED + 1
    ours.refuse(msgspec.structs.replace(OFFER, agent="p.0"))
    assert reads.count == MAX_REMEMBERED + 2


def started(ours: FabricPairs) -> LeaseTable:
    arena, leases = Arena(1, 4096), LeaseTable(2)
    try:
        ours.start(arena, leases, ScratchWords(1))
    finally:
        arena.close()
        leases.close()
    return leases


@pytest.mark.parametrize("lacks_cma", ["", "filtered"])
def test_the_offer_says_what_the_other_side_tries(lacks_cma: str) -> None:
    ours = pairs(lacks_cma=lacks_cma, has_rdma=True)
    leases = started(ours)
    offer = ours.offer()
    assert isinstance(offer, FabricOffer)
    assert offer.token == ("" if lacks_cma else leases.token)
    assert (offer.host_id, offer.rdma) == (host_id(), True)
    assert offer.pid > 0
    assert (ours.name, ours.num_live(), ours.stop()) == ("nixl", 3, False)


def test_a_library_that_cannot_start_is_passed_over_unless_asked_for() -> None:
    with pytest.raises(PassedOver, match="no backend"):
        started(pairs(inner=Fabric("no backend")))
    with pytest.raises(ConfigError, match="no backend"):
        started(pairs(inner=Fabric("no backend"), picky=False))

"""The proof of the lease word: thousands of pulls against a source that takes its blocks back.

Two processes. The source ends leases and writes their blocks anew at random moments, the word first
(as `Source` does); the sink pulls and looks at the word after the data, as the hand-off does. No
byte of a block that was written anew may ever be accepted, and without the look it must have been:
otherwise the run proves nothing.
"""

import os
import queue
import time
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from protocol.handoff import Offer
from tests.contract.transfer_sink import ROOT, PeerProcess
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec, Transfer
from worker.transfer.nixl import NixlTransfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer
from worker.transfer.ucx import UcxTransfer

PULLS = 16
"""In flight at once."""
PULL_BYTES = 256 * 1024
MIN_PULLS = 5000
MIN_STALE = 25
MAX_PULLS = 3 * MIN_PULLS
PATIENCE_S = 30.0


class Course(NamedTuple):
    """How one transport is raced: long pulls are hit more often, short ones cost less."""

    make: Callable[[], Transfer]
    blocks_each: int = 16
    source: dict[str, Any] = {}  # noqa: RUF012


COURSES: dict[str, Course] = {
    "shm": Course(ShmTransfer),
    # A kernel's buffers would take a whole pull at once: the source sends it in several pieces.
    "tcp": Course(TcpTransfer, 128, {"throttle_bytes_per_s": 128 << 20}),
    "ucx": Course(UcxTransfer),
    "nixl": Course(lambda: NixlTransfer(agent_name=f"race.{os.getpid()}.cma")),
    "nixl-tcp": Course(lambda: NixlTransfer(agent_name=f"race.{os.getpid()}.tcp")),
}


class RacePeerProcess(PeerProcess):
    script = ROOT / "tests/contract/race_peer.py"


class Tally:
    """What became of the pulls."""

    def __init__(self) -> None:
        self.accepted = self.caught = self.failed = 0
        self.stale_accepted = 0
        self.stale_caught = 0
        """What would have been used without the word."""

    @property
    def pulls(self) -> int:
        return self.accepted + self.caught + self.failed

    def count(self, *, ok: bool, held: bool, is_right: bool) -> None:
        if not ok:
            self.failed += 1  # a source that looked before it sent anything
        elif held:
            self.accepted += 1
            self.stale_accepted += not is_right
        else:
            self.caught += 1
            self.stale_caught += not is_right


class RacePull:
    """One pull as the hand-off does it: the data, then the word, then the verdict."""

    def __init__(self, sink: "RaceSink", number: int, spec: PullSpec, byte: int) -> None:
        self.spec = spec
        self.ok = False
        self.word: int | None = None
        self._sink = sink
        self._number = number
        self._byte = byte

    def begin(self) -> None:
        self._sink.transfer.pull(self.spec, self._data_ended)

    def is_right(self) -> bool:
        first = self._number * PULL_BYTES
        landed = self._sink.arena.memory[first : first + PULL_BYTES]
        return bytes(landed) == bytes([self._byte]) * PULL_BYTES

    def _data_ended(self, end: TransferEnd) -> None:
        self.ok, self.word = end.ok, end.word
        if end.ok and end.word is None:
            self._sink.scratch.zero(self._number)
            self._sink.transfer.read_word(self.spec, self._number, self._word_ended)
        else:
            self._sink.ended.put(self)

    def _word_ended(self, end: TransferEnd) -> None:
        self.word = end.word if end.ok else None
        self._sink.ended.put(self)


class RaceSink:
    def __init__(self, transfer: Transfer, blocks_each: int) -> None:
        self.transfer = transfer
        self.blocks_each = blocks_each
        self.block_bytes = PULL_BYTES // blocks_each
        self.arena = Arena(PULLS * blocks_each, self.block_bytes)
        self.leases = LeaseTable(1)
        self.scratch = ScratchWords(PULLS)
        self.ended: queue.SimpleQueue[RacePull] = queue.SimpleQueue()
        transfer.start(self.arena, self.leases, self.scratch)

    def round(self, offer: Offer, lent: list[Any], tally: Tally) -> float:
        """Pull everything that is lent; the seconds that took."""
        begun = time.monotonic()
        for number, (slot, nonce, remote, byte) in enumerate(lent):
            local = range(number * self.blocks_each, (number + 1) * self.blocks_each)
            spec = PullSpec(
                offer, array("I", remote), array("I", local), self.block_bytes, slot, nonce
            )
            RacePull(self, number, spec, byte).begin()
        pulls = [self.ended.get(timeout=PATIENCE_S) for _ in lent]
        seconds = time.monotonic() - begun
        for pull in pulls:
            tally.count(ok=pull.ok, held=pull.word == pull.spec.nonce, is_right=pull.is_right())
        return seconds

    def close(self) -> None:
        assert self.transfer.stop()
        self.arena.close()
        self.leases.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", COURSES)
def test_no_block_written_anew_is_ever_accepted(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    if transport == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    course = COURSES[transport]
    sink = RaceSink(course.make(), course.blocks_each)
    peer = RacePeerProcess(
        transport,
        num_blocks=sink.arena.num_blocks,
        block_bytes=sink.arena.block_bytes,
        num_slots=PULLS,
        seed=2026,
        **course.source,
    )
    tally = Tally()
    span_s = 0.005
    begun, used = time.monotonic(), time.process_time()
    while tally.pulls < MIN_PULLS or (tally.stale_caught < MIN_STALE and tally.pulls < MAX_PULLS):
        peer.say("round", pulls=PULLS, blocks_each=course.blocks_each, span_s=span_s)
        span_s += 0.2 * (min(0.25, sink.round(peer.offer, peer.hear(), tally)) - span_s)
        assert peer.hear() == "revoked"
    cpu_s = time.process_time() - used
    sink.close()
    peer.close()
    print(f"{transport}: {vars(tally)}, {span_s * 1e3:.1f} ms a round,", end=" ")
    print(f"{time.monotonic() - begun:.1f} s, {cpu_s:.1f} s of CPU here")
    assert tally.stale_accepted == 0
    assert tally.stale_caught >= MIN_STALE, "the word was hardly needed: this run proves nothing"
    assert tally.accepted >= MIN_PULLS // 20

"""Which operation runs when, over which connection: with connections that do as they are told."""

from array import array
from collections.abc import Callable, Iterator

import pytest

from protocol.handoff import Offer, TcpOffer
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.operations import LiveCount, Operation
from worker.transfer.reactor import Broken
from worker.transfer.sink_pool import SinkPool

OFFER = TcpOffer("127.0.0.1", 9)


class FakeConnection:
    """`breaks`: at the first thing that is asked for, before `begin` has returned. `raises`: what
    nobody foresaw, there."""

    def __init__(self, pool: "SinkPool[FakeConnection]", *, breaks: bool) -> None:
        self.offer: Offer = OFFER
        self.operation: Operation | None = None
        self.breaks = breaks
        self.raises = False
        self.pool = pool

    def begin(self, operation: Operation) -> None:
        self.operation = operation
        if self.raises:
            raise MemoryError
        if self.breaks:
            self.pool.retry(operation, self.offer)

    def finish(self) -> None:
        operation, self.operation = self.operation, None
        assert operation is not None
        operation.end(True, word=7)
        self.pool.finished(operation, self)


class World:
    """One pool, and the loop and connections it knows."""

    def __init__(self, *, max_per_peer: int) -> None:
        self.is_stopping = False
        self.is_reachable = True
        self.crash: Exception | None = None
        self.live = LiveCount()
        self.ends: dict[int, list[TransferEnd]] = {}
        self.made: list[FakeConnection] = []
        self.arena, self.scratch = Arena(8, 64), ScratchWords(1)
        self.pool = SinkPool[FakeConnection](
            self,
            self.arena,
            self.scratch,
            connect=self.connect,
            wrong_offer=lambda offer: "",
            max_per_peer=max_per_peer,
            max_active=16,
        )

    def call(self, function: Callable[[], None]) -> bool:
        function()
        return True

    def close(self, channel: FakeConnection, reason: str, *, peer_gone: bool = False) -> None:
        operation, channel.operation = channel.operation, None
        if operation is not None:
            operation.end(False, reason, peer_gone=peer_gone)
        self.pool.lost(operation, channel)

    def connect(self, offer: Offer, pool: "SinkPool[FakeConnection]") -> FakeConnection:
        if self.crash is not None:
            raise self.crash
        if not self.is_reachable:
            raise Broken("connect: ECONNREFUSED", peer_gone=True)
        self.made.append(FakeConnection(pool, breaks=False))
        return self.made[-1]

    def submit(self, number: int) -> None:
        blocks = array("I", [number])
        spec = PullSpec(OFFER, blocks, blocks, 64, 0, 7)
        ends = self.ends[number] = []
        self.pool.submit(Operation(spec, ends.append, self.live))

    def reasons(self) -> list[str]:
        """How each has ended, once each."""
        assert all(len(ends) == 1 for ends in self.ends.values())
        return [ends[0].reason.split(":")[0] for ends in self.ends.values()]


@pytest.fixture
def world() -> Iterator[World]:
    world = World(max_per_peer=2)
    yield world
    world.arena.close()


def test_as_many_at_once_as_the_source_is_given_and_the_rest_in_order(world: World) -> None:
    for number in range(5):
        world.submit(number)
    assert len(world.made) == 2
    while any(connection.operation for connection in world.made):
        next(c for c in world.made if c.operation).finish()
    assert world.reasons() == [""] * 5
    assert len(world.made) == 2, "connections are used again"
    assert world.live.value == 0


def test_pooled_connections_of_a_dead_source_end_all_that_waited(world: World) -> None:
    """Each start may break before it has returned, and then starts the next one itself."""
    for number in range(2):
        world.submit(number)
    for connection in list(world.made):
        connection.finish()
        connection.breaks = True
    world.is_stopping = True  # so that all of them wait
    for number in range(2, 8):
        world.submit(number)
    world.is_stopping = False
    world.is_reachable = False
    world.submit(0)
    assert world.live.value == 0
    assert world.reasons() == ["connect", "", *["connect"] * 6]


def test_broken_connection_of_a_worker_that_leaves_is_not_the_sources_fault(world: World) -> None:
    world.submit(0)
    world.is_stopping = True
    operation = world.made[0].operation
    assert operation is not None
    world.pool.retry(operation, OFFER)
    assert world.reasons() == ["stopped"]
    assert not world.ends[0][0].peer_gone
    assert len(world.made) == 1


def test_abort_ends_what_waits_at_once_and_what_runs_by_its_connection(world: World) -> None:
    for number in range(3):
        world.submit(number)
    waiting = next(iter(world.pool._waiting))
    world.pool.abort(waiting)
    assert [len(ends) for ends in world.ends.values()] == [0, 0, 1]
    running = world.made[0].operation
    assert running is not None
    world.pool.abort(running)
    world.pool.abort(running)
    world.made[1].finish()
    assert world.reasons() == ["aborted", "", "aborted"]
    assert world.live.value == 0


def test_what_nobody_foresaw_ends_the_operation_and_not_the_pool(world: World) -> None:
    world.crash = OSError(12, "Cannot allocate memory")
    world.submit(0)
    world.crash = None
    world.submit(1)
    world.made[0].finish()
    world.made[0].raises = True
    world.submit(2)
    world.submit(3)
    world.made[1].finish()
    assert world.reasons() == ["internal", "", "internal", ""]
    assert world.live.value == 0
    assert not world.ends[0][0].peer_gone


def test_an_offer_that_cannot_be_looked_at_ends_the_operation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(offer: Offer) -> str:
        raise ValueError("an offer that nobody foresaw")

    monkeypatch.setattr(world.pool, "_wrong_offer", fail)
    world.submit(0)
    assert world.reasons() == ["internal"]
    assert world.live.value == 0

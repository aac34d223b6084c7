"""Endpoints that fail the moment they are made or rest: none is left open, none is forgotten. No
UCX."""

import time
from array import array
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from protocol.handoff import FabricOffer, Offer
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer import ucx_server
from worker.transfer.base import PullSpec
from worker.transfer.operations import LiveCount, Operation
from worker.transfer.reactor import Broken
from worker.transfer.sink_pool import SinkPool
from worker.transfer.tcp_server import ServerLimits
from worker.transfer.tcp_wire import WORD, Status, encode_reply
from worker.transfer.ucx import UcxTransfer
from worker.transfer.ucx_loop import UcxChannel, UcxLoop
from worker.transfer.ucx_server import UcxListener
from worker.transfer.ucx_sink import UcxSinkConnection

OFFER = FabricOffer("ucx", "", b"", 0, 0, host="127.0.0.1", port=9)
CONNECT_S = 3.0
NONCE = 77


class FakePosted:
    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer
        self.num_bytes = len(buffer)
        self.done = False

    def is_done(self) -> bool:
        return self.done


class FakeStream:
    def __init__(self) -> None:
        self.crash: Exception | None = None
        self.received: list[FakePosted] = []
        self.num_unsent = 1
        self.num_closed = 0

    def send(self, buffer: bytes) -> FakePosted:
        return FakePosted(bytearray(buffer))

    def receive(self, buffer: bytearray) -> FakePosted:
        if self.crash is not None:
            raise self.crash
        self.received.append(FakePosted(buffer))
        return self.received[-1]

    def fill(self, data: bytes) -> None:
        """What the last receive waits for comes."""
        self.received[-1].buffer[:] = data
        self.received[-1].done = True

    def close(self) -> None:
        self.num_closed += 1


class FakeLoop:
    """Also its library, every endpoint of which is `stream`."""

    is_stopping = False

    def __init__(self) -> None:
        self.library = self
        self.stream = FakeStream()
        self.channels: list[UcxChannel] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def connect(self, host: str, port: int) -> FakeStream:
        return self.stream

    def accept(self, listener: object, request: int) -> FakeStream:
        return self.stream

    def add(self, channel: UcxChannel) -> None:
        self.channels.append(channel)

    def poke(self) -> None:
        pass

    def call(self, function: Callable[[], None]) -> bool:
        function()
        return True

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        self.timers.append((delay_s, function))

    def close(self, channel: UcxChannel, reason: str, *, peer_gone: bool = False) -> None:
        self.channels.remove(channel)
        channel.stream.close()
        channel.closed(reason, peer_gone=peer_gone)


class World:
    """A loop, and who pulls and lends in it."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        loop = cast("UcxLoop", self.loop)
        self.arena, self.leases, self.scratch = Arena(8, 64), LeaseTable(4), ScratchWords(4)
        self.live = LiveCount()
        self.ends: list[TransferEnd] = []
        self.pool = SinkPool[UcxSinkConnection](
            loop,
            self.arena,
            self.scratch,
            connect=lambda offer, pool: UcxSinkConnection(offer, pool, loop, CONNECT_S),
            wrong_offer=lambda offer: "",
            max_per_peer=1,
            max_active=16,
        )
        self.listener = UcxListener(loop, self.arena, self.leases, ServerLimits())

    def read_word(self, scratch_slot: int = 0) -> None:
        spec = PullSpec(OFFER, array("I"), array("I"), 64, 0, NONCE)
        operation = Operation(spec, self.ends.append, self.live, scratch_slot=scratch_slot)
        self.pool.submit(operation)

    def turn(self) -> None:
        """As the loop does: who raises is closed."""
        for channel in list(self.loop.channels):
            try:
                channel.advance()
            except Exception as error:  # noqa: BLE001  as the loop
                self.loop.close(channel, f"internal: {error!r}")

    def answer(self) -> None:
        """The source's, in both its parts; the next turn ends it."""
        stream = self.loop.stream
        self.turn()
        stream.num_unsent = 0
        stream.fill(encode_reply(Status.OK, 0))
        self.turn()
        stream.fill(WORD.pack(NONCE))

    def knock(self) -> None:
        self.listener._knock(1)
        _, admit = self.loop.timers.pop()
        admit()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.arena.close()
    world.leases.close()


@pytest.mark.parametrize("crash", [Broken("closed: at once"), MemoryError()])
def test_an_endpoint_that_fails_its_first_receive_is_closed(world: World, crash: Exception) -> None:
    world.loop.stream.crash = crash
    world.read_word()
    assert world.loop.stream.num_closed == 1
    assert [end.ok for end in world.ends] == [False]
    assert (world.live.value, world.loop.channels) == (0, [])


def test_a_reader_that_has_gone_before_its_first_receive_is_closed(world: World) -> None:
    world.loop.stream.crash = Broken("closed: at once")
    world.knock()
    assert world.loop.stream.num_closed == 1
    assert world.loop.channels == []


def test_a_pooled_endpoint_gets_time_for_the_next_request(world: World) -> None:
    world.read_word()
    world.answer()
    world.turn()
    assert [end.ok for end in world.ends] == [True]
    [connection] = world.loop.channels
    connection.deadline = time.monotonic()  # it has rested for long
    world.loop.stream.num_unsent = 1
    world.read_word()
    world.turn()
    assert connection.deadline is not None
    assert connection.deadline > time.monotonic() + CONNECT_S / 2


def test_an_endpoint_that_fails_after_the_end_gives_its_place_back(world: World) -> None:
    world.read_word()
    world.answer()
    world.loop.stream.crash = MemoryError()
    world.turn()
    assert [end.ok for end in world.ends] == [True]
    assert (world.pool._active, world.pool._active_of, world.pool._idle) == ({}, {}, {})


def test_a_word_that_cannot_be_written_ends_its_operation(world: World) -> None:
    world.read_word(scratch_slot=world.scratch.num_slots)
    world.answer()
    world.turn()
    assert [end.ok for end in world.ends] == [False]
    assert world.live.value == 0


def test_silent_clients_are_looked_for_again_after_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> set[tuple[str, int]]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ucx_server, "drop_silent", fail)
    with pytest.raises(OSError, match="open files"):
        world.listener._drop_silent()
    assert [function for _, function in world.loop.timers] == [world.listener._drop_silent]


def test_a_transport_whose_thread_has_died_refuses() -> None:
    transfer = UcxTransfer()
    offer: Offer = OFFER
    assert transfer.refuse(offer) == ""
    loop = FakeLoop()
    transfer._loop = cast("UcxLoop", loop)
    assert transfer.refuse(offer) == ""
    loop.is_stopping = True
    assert transfer.refuse(offer) == "ucx does not run any more"

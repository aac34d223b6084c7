"""`tcp` when one of its threads has died: the others do its work, and without any it says so."""

import errno
import logging
import socket
import time
from array import array
from collections.abc import Callable, Iterator

import pytest

from protocol.handoff import TcpOffer
from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.reactor import Reactor
from worker.transfer.tcp import TcpTransfer

PATIENCE_S = 5.0
NONCE = 77


class End:
    """A worker's memory and its `tcp`."""

    def __init__(self, max_connections: int = 256) -> None:
        self.arena, self.leases, self.scratch = Arena(8, 64), LeaseTable(4), ScratchWords(4)
        self.leases.write(0, NONCE)
        self.transfer = TcpTransfer(num_threads=2, max_connections=max_connections)
        self.transfer.start(self.arena, self.leases, self.scratch)
        self.ends: list[TransferEnd] = []

    def pull(self, source: "End") -> TransferEnd:
        offer = source.transfer.offer()
        spec = PullSpec(offer, array("I", [0, 1]), array("I", [4, 5]), 64, 0, NONCE)
        before = len(self.ends)
        self.transfer.pull(spec, self.ends.append)
        until(lambda: len(self.ends) > before)
        return self.ends[-1]

    def close(self) -> None:
        assert self.transfer.stop()
        self.arena.close()


@pytest.fixture
def source() -> Iterator[End]:
    source = End(max_connections=3)
    yield source
    source.close()


@pytest.fixture
def sink() -> Iterator[End]:
    sink = End()
    yield sink
    sink.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(timeout: float | None) -> list[object]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(reactor._selector, "select", fail)
    reactor.call(lambda: None)
    until(lambda: not reactor._thread.is_alive())


def dial(source: End) -> socket.socket:
    offer = source.transfer.offer()
    assert isinstance(offer, TcpOffer)
    return socket.create_connection((offer.host, offer.port), timeout=PATIENCE_S)


@pytest.mark.parametrize("number", [0, 1])
def test_who_pulls_goes_on_with_the_thread_that_lives(
    source: End,
    sink: End,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kill(sink.transfer._reactors[number], monkeypatch)
    assert all(sink.pull(source).ok for _ in range(6))
    assert sink.transfer.refuse(source.transfer.offer()) == ""
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert said[1:] == ["tcp goes on with 1 of 2 threads"], "the first is the error itself"


@pytest.mark.parametrize("number", [0, 1])
def test_who_lends_goes_on_with_the_thread_that_lives(
    source: End, sink: End, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sink.pull(source).ok
    kill(source.transfer._reactors[number], monkeypatch)
    for _ in range(8):
        dial(source).close()
    assert all(sink.pull(source).ok for _ in range(4))


def test_a_thread_that_dies_with_a_connection_on_its_way_to_it_takes_no_room(
    source: End, sink: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked alive a moment ago."""
    dead = source.transfer._reactors[1]
    monkeypatch.setattr(dead, "call", lambda _: False)
    for _ in range(8):
        dial(source).close()
    listener = source.transfer._listener
    assert listener is not None
    until(lambda: source.transfer.stats.connections == 8 and not listener._connections)
    assert sink.pull(source).ok


def test_without_a_thread_it_refuses_and_ends_what_is_asked_for_all_the_same(
    source: End, sink: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that another transport is chosen at once."""
    for reactor in sink.transfer._reactors:
        kill(reactor, monkeypatch)
    assert sink.transfer.refuse(source.transfer.offer()) == "tcp does not run any more"
    assert not sink.pull(source).ok
    assert sink.transfer.num_live() == 0


def test_a_word_that_cannot_be_written_ends_its_operation(
    source: End, sink: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PullSpec(source.transfer.offer(), array("I"), array("I"), 64, 0, NONCE)
    sink.transfer.read_word(spec, sink.scratch.num_slots, sink.ends.append)
    until(lambda: bool(sink.ends))
    assert sink.ends[0].reason == "internal: the socket's handler raised"
    assert sink.pull(source).ok


def test_a_stop_is_no_death(source: End, caplog: pytest.LogCaptureFixture) -> None:
    assert source.transfer.stop()
    assert caplog.messages == []

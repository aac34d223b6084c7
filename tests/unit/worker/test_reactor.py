"""The thread of sockets when the system refuses it something: nobody is forgotten, it goes on."""

import errno
import selectors
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest

from worker.handoff.ends import TransferEnd
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.reactor import READ, Broken, Reactor
from worker.transfer.tcp import TcpTransfer

PATIENCE_S = 5.0


class FakeChannel:
    """One end of a pair of sockets, the other end is `peer`."""

    def __init__(self) -> None:
        self.sock, self.peer = socket.socketpair()
        self.deadline: float | None = None
        self.is_ready = threading.Event()
        self.reasons: list[str] = []

    def ready(self) -> None:
        self.is_ready.set()
        raise Broken("enough")

    def closed(self, reason: str, *, peer_gone: bool) -> None:
        self.reasons.append(reason)
        self.peer.close()


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor("test-reactor")
    reactor.start()
    yield reactor
    assert reactor.stop(PATIENCE_S)


def in_thread(reactor: Reactor, function: Callable[[], object]) -> BaseException | None:
    """What it raised there."""
    done = threading.Event()
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001  the test looks at it
            raised[0] = error
        done.set()

    assert reactor.call(run)
    assert done.wait(PATIENCE_S)
    return raised[0]


def refuse_once(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no room for one more socket to watch, once."""
    register = reactor._selector.register

    def refuse(*_: object) -> selectors.SelectorKey:
        monkeypatch.setattr(reactor._selector, "register", register)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reactor._selector, "register", refuse)


def until_ready(reactor: Reactor) -> None:
    """It still serves sockets."""
    channel = FakeChannel()
    assert in_thread(reactor, lambda: reactor.add(channel, READ)) is None
    channel.peer.send(b"x")
    assert channel.is_ready.wait(PATIENCE_S)


def test_a_socket_that_cannot_be_watched_is_closed_and_told(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = FakeChannel()
    channel.deadline = time.monotonic()
    refuse_once(reactor, monkeypatch)
    error = in_thread(reactor, lambda: reactor.add(channel, READ))
    assert isinstance(error, Broken)
    assert not error.peer_gone
    assert channel.reasons == ["closed: No space left on device"]
    assert channel.sock.fileno() == -1
    assert in_thread(reactor, reactor._sweep) is None
    until_ready(reactor)


def test_a_resting_socket_that_cannot_be_watched_again_rests_until_its_deadline(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = FakeChannel()
    assert in_thread(reactor, lambda: reactor.add(channel, 0)) is None
    refuse_once(reactor, monkeypatch)
    assert isinstance(in_thread(reactor, lambda: reactor.watch(channel, READ)), OSError)
    assert in_thread(reactor, lambda: reactor.close(channel, "late")) is None
    assert channel.reasons == ["late"]
    until_ready(reactor)


def test_a_socket_that_the_selector_has_lost_is_closed_all_the_same(reactor: Reactor) -> None:
    channel = FakeChannel()
    assert in_thread(reactor, lambda: reactor.add(channel, READ)) is None
    in_thread(reactor, lambda: reactor._selector.unregister(channel.sock))
    assert in_thread(reactor, lambda: reactor.close(channel, "gone")) is None
    assert channel.reasons == ["gone"]
    until_ready(reactor)


def test_a_thread_that_fails_closes_all_and_takes_no_more(
    reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, ended = FakeChannel(), threading.Event()
    in_thread(reactor, lambda: reactor.add(channel, READ))
    in_thread(reactor, lambda: reactor.at_end(ended.set))

    def fail(timeout: float | None) -> list[object]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(reactor._selector, "select", fail)
    reactor.call(lambda: None)
    assert ended.wait(PATIENCE_S)
    assert channel.reasons == ["stopped: the worker leaves"]
    assert not reactor.call(lambda: None)


def test_a_pull_that_gets_no_socket_ends_and_the_next_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena, leases, scratch = Arena(8, 64), LeaseTable(4), ScratchWords(4)
    transfer = TcpTransfer(num_threads=1)
    transfer.start(arena, leases, scratch)
    leases.write(0, 77)
    ends: list[TransferEnd] = []
    heard = threading.Semaphore(0)

    def on_end(end: TransferEnd) -> None:
        ends.append(end)
        heard.release()

    def pull() -> None:
        spec = PullSpec(transfer.offer(), array("I", [0, 1]), array("I", [4, 5]), 64, 0, 77)
        transfer.pull(spec, on_end)
        assert heard.acquire(timeout=PATIENCE_S)

    [reactor] = transfer._reactors
    in_thread(reactor, lambda: None)  # it listens
    refuse_once(reactor, monkeypatch)
    pull()
    pull()
    assert [(end.ok, end.peer_gone) for end in ends] == [(False, False), (True, False)]
    assert ends[0].reason == "closed: No space left on device"
    assert transfer.num_live() == 0
    assert transfer.stop()
    arena.close()

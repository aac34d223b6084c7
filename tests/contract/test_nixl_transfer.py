"""What only `nixl` promises, on both of its ways on one host: CMA and plain TCP."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from protocol.errors import LocalError
from tests.contract.nixl_world import (
    LARGE,
    SLOW,
    WAYS,
    PeerMaker,
    SinkMaker,
    cpu_s,
    num_peers,
    peers,
    sinks,
    taken,
)
from tests.contract.transfer_sink import ROOT, Ends, PeerProcess, until


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return taken(request.param, monkeypatch)


@pytest.fixture
def tcp_only(monkeypatch: pytest.MonkeyPatch) -> None:
    taken("tcp", monkeypatch)


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    yield from peers()


@pytest.fixture
def make_sink() -> Iterator[SinkMaker]:
    yield from sinks()


def test_connected_source_that_freezes(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, other = make_peer(num_blocks=LARGE), make_peer()
    sink = make_sink(LARGE)
    # One block may arrive before UCX is done connecting, which takes both ends; this much does not.
    assert sink.pull(sink.spec(peer.offer, range(LARGE))).ok
    sink.arena.memory[:] = bytes(sink.arena.nbytes)
    peer.freeze()
    ticket, ends = sink.begin(sink.spec(peer.offer, range(LARGE)))
    if way == "tcp":
        with pytest.raises(queue.Empty):
            ends.wait(1.5)
        ticket.abort()
        assert sink.pull(sink.spec(other.offer, [3])).ok, "others have their turn"
        assert ends.is_empty(), "an abort proves nothing"
        assert sink.transfer.num_live() == 1
        peer.thaw()
        end = ends.wait()
        assert (end.ok, end.reason.split(":")[0], end.peer_gone) == (False, "aborted", False)
        assert 0 < end.num_bytes < LARGE * 65536, "what was posted came, nothing else was posted"
    else:
        end = ends.wait()
        assert end.ok
        assert sink.word(sink.spec(peer.offer, [])) == 77
        peer.thaw()
        assert sink.holds(range(LARGE), range(LARGE))
    assert sink.transfer.num_live() == 0


def test_idle_source_that_died_is_gone_at_once(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    peer, sink = make_peer(), make_sink()
    assert sink.pull(sink.spec(peer.offer, range(8))).ok
    peer.kill()
    for _ in range(2):  # first over the old connection, then with the metadata loaded again
        begun = time.monotonic()
        end = sink.pull(sink.spec(peer.offer, range(8)))
        assert time.monotonic() - begun < 2.0
        assert (end.ok, end.peer_gone, end.num_bytes) == (False, True, 0)
        until(lambda: num_peers(sink) == 0)
    assert capfd.readouterr().out == "", "the library keeps off stdout"


def test_restarted_worker_is_another_agent(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    sink, first = make_sink(), make_peer(agent_name="w.1")
    assert sink.pull(sink.spec(first.offer, range(4))).ok
    second = make_peer(agent_name="w.2")
    second.ask("fill", version=2)
    assert sink.pull(sink.spec(second.offer, range(4), range(4, 8))).ok
    first.kill()
    end = sink.pull(sink.spec(first.offer, range(4)))
    assert (end.ok, end.peer_gone) == (False, True)
    assert sink.pull(sink.spec(second.offer, range(4))).ok
    assert sink.holds(range(4), range(4), version=2)


def test_metadata_is_loaded_again_after_an_error(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    sink = make_sink(LARGE, throttle_bytes_per_s=SLOW)
    first = make_peer(agent_name="same", num_blocks=LARGE)
    running = [sink.begin(sink.spec(first.offer, range(n, LARGE, 2))) for n in range(2)]
    until(lambda: all(ticket.num_bytes_done for ticket, _ in running))
    first.kill()
    second = make_peer(agent_name="same")
    waiting = sink.begin(sink.spec(second.offer, range(4)))[1]
    for _, ends in running:
        end = ends.wait()
        assert (end.ok, end.peer_gone) == (False, True)
    if not waiting.wait().ok:  # it was begun before NIXL had noticed
        assert sink.pull(sink.spec(second.offer, range(4))).ok
    assert sink.holds(range(4), range(4))
    assert num_peers(sink) == 1


def test_many_sources_with_room_for_two(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peers, sink = [make_peer() for _ in range(4)], make_sink(max_peers=2)
    for number, peer in enumerate([*peers, *peers]):
        blocks = [number * 4, number * 4 + 1]
        assert sink.pull(sink.spec(peer.offer, blocks)).ok
        assert sink.holds(blocks, blocks)
        assert num_peers(sink) <= 2
    running = [sink.begin(sink.spec(peer.offer, range(64)))[1] for peer in peers]
    assert all(ends.wait().ok for ends in running)
    until(lambda: num_peers(sink) == 2)


def test_pull_from_ourselves(way: str, make_sink: SinkMaker) -> None:
    sink = make_sink()
    sink.leases.write(0, 5)
    sink.arena.block(3)[:] = b"x" * 65536
    spec = sink.spec(sink.transfer.offer(), [3], [4], slot=0, nonce=5)
    assert sink.pull(spec).ok
    assert sink.word(spec) == 5
    assert bytes(sink.arena.block(4)) == b"x" * 65536


def test_aborts_at_every_moment(way: str, make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink()
    ends = [Ends() for _ in range(60)]
    for number, end in enumerate(ends):
        ticket = sink.transfer.pull(sink.spec(peer.offer, range(number % 8, 64)), end)
        if number % 3 == 0:
            ticket.abort()  # as a rule before it is posted
        elif number % 3 == 1:
            threading.Timer(number * 1e-4, ticket.abort).start()
    reasons = {end.wait().reason.split(":")[0] for end in ends}
    assert reasons <= {"", "aborted"}
    assert sink.transfer.num_live() == 0
    ticket, last = sink.begin(sink.spec(peer.offer, range(64)))
    assert last.wait().ok
    ticket.abort()
    assert sink.pull(sink.spec(peer.offer, [0])).ok
    assert all(end.is_empty() for end in [*ends, last]), "ended once"


def test_stop_during_a_burst_then_the_source_still_serves(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(num_blocks=LARGE), make_sink(LARGE)
    ends = [sink.begin(sink.spec(peer.offer, range(n, LARGE, 32)))[1] for n in range(32)]
    assert sink.transfer.stop()
    assert {end.wait(0.1).reason.split(":")[0] for end in ends} <= {"", "stopped"}
    assert all(end.is_empty() for end in ends)
    assert sink.transfer.num_live() == 0
    assert sink.transfer.stop(), "repeats do nothing"
    with pytest.raises(LocalError, match="not running"):
        sink.pull(sink.spec(peer.offer, [0]))
    third = make_sink()
    assert third.pull(third.spec(peer.offer, range(64))).ok


def leave(peer: PeerProcess, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/contract/nixl_leaver.py"), peer.ask("offer"), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_exit_with_a_read_running_does_not_kill_the_source(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer = make_peer(num_blocks=LARGE)
    with leave(peer, "running") as leaver:
        assert leaver.stdin is not None
        assert leaver.stdout is not None
        assert leaver.stdout.readline() == "true\n"
        leaver.stdin.write("go\n")
        leaver.stdin.flush()
        assert leaver.wait() == 0, "it left after the pull's end: this run proves nothing"
    sink = make_sink()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))
    assert peer.process.poll() is None


def test_sink_that_leaves_in_the_middle_does_not_kill_its_source(
    tcp_only: None, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    """Only over TCP: under CMA a read of a frozen source ends. The source must run again before
    the sink leaves: what a frozen one finds of a dead reader when it goes on kills it, inside UCX
    (see the ADR), and nothing here can change that."""
    peer = make_peer(num_blocks=LARGE)
    with leave(peer, "frozen") as leaver:
        assert leaver.stdin is not None
        assert leaver.stdout is not None
        assert leaver.stdout.readline() == "true\n"
        peer.freeze()
        leaver.stdin.write("go\n")
        leaver.stdin.flush()
        assert leaver.stdout.readline() == "[false, 1]\n"
        peer.thaw()
        leaver.stdin.write("leave\n")
        leaver.stdin.flush()
        assert leaver.wait() == 0
    sink = make_sink()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))
    assert peer.process.poll() is None


def test_idle_transfer_costs_next_to_nothing(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    pids = (peer.pid, os.getpid())  # both ends of a connection
    before, begun = [cpu_s(pid) for pid in pids], time.monotonic()
    threading.Event().wait(4.0)
    passed_s = time.monotonic() - begun
    for pid, start in zip(pids, before, strict=True):
        assert (cpu_s(pid) - start) / passed_s <= 0.03


def test_word_of_a_frozen_source_comes_when_it_goes_on(
    tcp_only: None, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink()
    spec = sink.spec(peer.offer, [0])
    assert sink.pull(spec).ok
    peer.freeze()
    sink.scratch.zero(2)
    ends = Ends()
    sink.transfer.read_word(spec, 2, ends)
    with pytest.raises(queue.Empty):
        ends.wait(1.0)
    assert (sink.transfer.num_live(), sink.scratch.read(2)) == (1, 0)
    peer.thaw()
    assert ends.wait().word == sink.scratch.read(2) == 77


def test_source_that_drains_while_it_is_read(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    """It should have waited for its leases; who reads all the same hears that it is gone."""
    peer, sink = make_peer(num_blocks=LARGE), make_sink(LARGE, throttle_bytes_per_s=SLOW)
    other = make_peer()
    ticket, ends = sink.begin(sink.spec(peer.offer, range(LARGE)))
    until(lambda: ticket.num_bytes_done > 0)
    peer.say("stop")
    end = ends.wait()
    assert (end.ok, end.peer_gone) == (False, True)
    assert sink.pull(sink.spec(other.offer, [1])).ok

"""What only `nixl` promises, on both of its ways on one host: CMA and plain TCP."""

import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from protocol.errors import ConfigError, LocalError
from protocol.handoff import FabricOffer
from tests.contract.transfer_sink import ROOT, Ends, PeerProcess, Sink, until
from worker.transfer.nixl import NixlTransfer

LARGE = 1024
SLOW = 24 << 20
"""Bytes per second at which "in the middle of a pull" lasts long enough to act in it."""
_names = (f"sink.{os.getpid()}.x{n}" for n in itertools.count())
PeerMaker = Callable[..., PeerProcess]
SinkMaker = Callable[..., Sink]


@pytest.fixture(params=["cma", "tcp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("UCX_TLS", raising=False)
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return str(request.param)


@pytest.fixture
def tcp_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    peers: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        peers.append(PeerProcess("nixl", **options))
        peers[-1].ask("lend", slot=1, nonce=77)
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def make_sink() -> Iterator[SinkMaker]:
    sinks: list[Sink] = []

    def make(num_blocks: int = 64, **options: Any) -> Sink:
        sinks.append(Sink(NixlTransfer(agent_name=next(_names), **options), num_blocks))
        return sinks[-1]

    yield make
    for sink in sinks:
        assert sink.close(), "an operation was live at the end of the test"


def num_peers(sink: Sink) -> int:
    assert isinstance(sink.transfer, NixlTransfer)
    return sink.transfer.num_peers


def offer_of(peer: PeerProcess) -> FabricOffer:
    assert isinstance(peer.offer, FabricOffer)
    return peer.offer


def cpu_s(pid: int) -> float:
    """Processor time a process has used, all threads."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_connected_source_that_freezes(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, other = make_peer(num_blocks=LARGE), make_peer()
    sink = make_sink(LARGE)
    assert sink.pull(sink.spec(peer.offer, [0])).ok
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


def test_damaged_offers_harm_nobody(way: str, make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink(throttle_bytes_per_s=SLOW)
    good = offer_of(peer)
    running = sink.begin(sink.spec(good, range(32)))[1]
    changes: list[dict[str, Any]] = [
        {"agent": "nobody.1", "metadata": b"nonsense"},
        {"agent": "nobody.1", "metadata": good.metadata[:-3]},
        {"agent": "nobody.1"},  # another's metadata
        {"agent": "nobody.1", "metadata": b"nixlSerDes|Agent nobody.1"},
        {"arena_address": good.arena_address + (1 << 40)},
        {"arena_bytes": 1 << 40},
    ]
    for change in changes:
        block = 64 if "arena_bytes" in change else 63
        end = sink.pull(sink.spec(msgspec.structs.replace(good, **change), [block], [63]))
        assert (end.ok, end.peer_gone, end.num_bytes) == (False, False, 0), change
        assert end.reason.startswith("bad_request"), change
    for change in ({"metadata": b""}, {"agent": ""}, {"backend": "nixl/OBJ"}, {"kind": "tape"}):
        offer = msgspec.structs.replace(good, **change)
        assert sink.transfer.refuse(offer) != ""
        assert sink.pull(sink.spec(offer, [63])).reason.startswith("bad_request")
    assert running.wait().ok
    assert sink.holds(range(32), range(32))
    assert sink.is_untouched(range(32, 64))
    assert sink.pull(sink.spec(good, [63])).ok


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


def test_sink_that_leaves_in_the_middle_does_not_kill_its_source(
    tcp_only: None, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    """Only over TCP: under CMA a read of a frozen source ends. The source must run again before
    the sink leaves: what a frozen one finds of a dead reader when it goes on kills it, inside UCX
    (see the ADR), and nothing here can change that."""
    peer = make_peer(num_blocks=LARGE)
    leaver = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/contract/nixl_leaver.py"), peer.ask("offer")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with leaver:
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


def test_what_nobody_foresaw_is_accounted_for(
    tcp_only: None, make_peer: PeerMaker, make_sink: SinkMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, sink = make_peer(num_blocks=LARGE), make_sink(LARGE)
    assert sink.pull(sink.spec(peer.offer, [0])).ok
    transfer = sink.transfer
    assert isinstance(transfer, NixlTransfer)
    thread = transfer._thread
    assert thread is not None

    def raises(*_: object) -> None:
        raise ValueError("of a kind nobody thought of")

    peer.freeze()
    lost = sink.begin(sink.spec(peer.offer, range(LARGE)))[1]
    until(lambda: bool(thread._flights and thread._flights[0].posted))
    with monkeypatch.context() as patch:
        patch.setattr(thread._agent, "check_xfer_state", raises)
        until(lambda: thread.failure != "")
    assert "ValueError" in transfer.refuse(peer.offer)
    end = sink.pull(sink.spec(peer.offer, [0]))
    assert (end.ok, end.reason) == (False, f"bad_request: {transfer.refuse(peer.offer)}")
    peer.thaw()
    assert not transfer.stop()
    assert lost.is_empty(), "nobody knows whether it still writes"
    assert transfer.num_live() == 1
    until(lambda: sink.holds(range(256), range(256)))  # two pieces of 8 MiB were posted
    transfer._live.add(-1)  # it is over by now: let the tear-down pass


def test_libfabric_that_cannot_be_loaded_becomes_ucx(
    make_sink: SinkMaker, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make_sink(backend="LIBFABRIC")
    offer = sink.transfer.offer()
    assert isinstance(offer, FabricOffer)
    if offer.backend == "nixl/UCX":
        assert "LIBFABRIC cannot be loaded" in caplog.text
        assert "UCX is used instead" in caplog.text


def test_ways_without_tcp_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "posix,self")
    with pytest.raises(ConfigError, match=r"UCX cannot be loaded: .*UCX_TLS=posix,self"):
        Sink(NixlTransfer(agent_name=next(_names)))

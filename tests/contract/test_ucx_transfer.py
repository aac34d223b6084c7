"""What only `ucx` promises: it sleeps when nothing happens, says what is wrong, survives the other
end. Strangers are in `test_ucx_strangers`, what all transports promise in `test_transfer_*`."""

import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, TcpOffer
from tests.contract.transfer_sink import ROOT, Sink, until
from tests.contract.ucx_world import PeerMaker, cpu_s, peers, place
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer import ucx_library
from worker.transfer.operations import Operation
from worker.transfer.ucx import UcxTransfer, ucx_unavailable


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    yield from peers()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(UcxTransfer(connect_timeout_s=3.0))
    yield sink
    assert sink.close()


def test_frozen_peer_does_not_keep_others_waiting(make_peer: PeerMaker, sink: Sink) -> None:
    frozen, well = make_peer(), make_peer()
    assert sink.pull(sink.spec(frozen.offer, [0])).ok
    frozen.freeze()
    stuck = [sink.begin(sink.spec(frozen.offer, [n])) for n in range(32)]
    for n in range(32, 64):
        assert sink.pull(sink.spec(well.offer, [n])).ok
    assert sink.transfer.num_live() == 32
    for ticket, _ in stuck:
        ticket.abort()
    assert {ends.wait().reason.split(":")[0] for _, ends in stuck} == {"aborted"}
    assert sink.transfer.num_live() == 0
    frozen.thaw()
    assert sink.pull(sink.spec(frozen.offer, [0])).ok


def test_place_where_nobody_listens_is_said_at_once(sink: Sink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    offer = FabricOffer("ucx", "", b"", 0, 0, host="127.0.0.1", port=port)
    for _ in range(40):
        running = [sink.begin(sink.spec(offer, [n])) for n in range(8)]
        for _, ends in running:
            end = ends.wait()
            assert (end.ok, end.peer_gone, end.reason.split(":")[0]) == (False, True, "connect")
    assert sink.is_untouched(range(64))


def test_place_that_does_not_answer_is_given_up() -> None:
    sink = Sink(UcxTransfer(connect_timeout_s=0.4))
    with socket.create_server(("127.0.0.1", 0)) as server:
        offer = FabricOffer("ucx", "", b"", 0, 0, host="127.0.0.1", port=server.getsockname()[1])
        end = sink.pull(sink.spec(offer, [1]))
    assert (end.ok, end.peer_gone, end.reason.split(":")[0]) == (False, True, "timeout")
    assert sink.is_untouched(range(64))
    assert sink.close()


def test_other_block_size_is_refused_but_is_no_sign_of_death(
    make_peer: PeerMaker, sink: Sink
) -> None:
    peer = make_peer(block_bytes=1024)
    end = sink.pull(sink.spec(peer.offer, [1]))
    assert (end.ok, end.peer_gone, end.word) == (False, False, None)
    assert end.reason.startswith("refused")


def test_many_small_pulls_use_few_connections(make_peer: PeerMaker, sink: Sink) -> None:
    peer, rng = make_peer(), random.Random(8)
    for _ in range(20):
        running = []
        for _ in range(40):
            blocks = [rng.randrange(64), rng.randrange(64)]
            running.append((blocks, sink.begin(sink.spec(peer.offer, blocks))[1]))
        assert all(ends.wait().word == 77 for _, ends in running)
    assert sink.holds(range(64), range(64)) or sink.pull(sink.spec(peer.offer, range(64))).ok
    assert peer.ask("stats")["connections"] <= 4


def test_pooled_connection_that_died_is_replaced(make_peer: PeerMaker, sink: Sink) -> None:
    first = make_peer()
    assert sink.pull(sink.spec(first.offer, range(8))).ok
    first.kill()
    second = make_peer(port=place(first.offer)[1])
    second.ask("fill", version=5)
    end = sink.pull(sink.spec(first.offer, range(8)))
    assert (end.ok, end.word) == (True, 77)
    assert sink.holds(range(8), range(8), version=5)
    second.kill()
    begun = time.monotonic()
    end = sink.pull(sink.spec(first.offer, range(8)))
    assert (end.ok, end.peer_gone) == (False, True)
    assert time.monotonic() - begun < 5.0


def test_stop_in_the_middle_leaves_the_source_well(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(num_blocks=1024, throttle_bytes_per_s=24 << 20)
    leaver = Sink(UcxTransfer(), num_blocks=1024)
    ticket, ends = leaver.begin(leaver.spec(peer.offer, range(1024)))
    until(lambda: ticket.num_bytes_done > 0)
    assert leaver.close()
    assert ends.wait(0.1).reason.startswith("stopped")
    assert sink.pull(sink.spec(peer.offer, range(16))).ok
    assert peer.ask("stats")["rubbish"] == 0, "to leave is not to speak rubbish"
    assert sink.holds(range(16), range(16))


def test_pull_goes_on_where_others_are_given_up(make_peer: PeerMaker, sink: Sink) -> None:
    """An abort closes endpoints, with receives posted: no other endpoint notices."""
    peer = make_peer(throttle_bytes_per_s=64 << 20)
    for _ in range(20):
        running = [sink.begin(sink.spec(peer.offer, range(n, 64, 8))) for n in range(8)]
        until(lambda running=running: running[0][0].num_bytes_done > 0)  # type: ignore[misc]
        for ticket, _ in running[2:]:
            ticket.abort()
        assert all(ends.wait().ok for _, ends in running[:2])
        for ticket, _ in running[:2]:
            assert isinstance(ticket, Operation)
            assert ticket.retries == 0
        for _, ends in running[2:]:
            ends.wait()
    assert sink.transfer.num_live() == 0
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))


def test_reader_killed_in_the_middle_leaves_the_source_well(
    make_peer: PeerMaker, sink: Sink
) -> None:
    peer = make_peer(num_blocks=1024, throttle_bytes_per_s=24 << 20)
    host, port = place(peer.offer)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, host, str(port)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"pulling\n"
    reader.kill()
    reader.wait()
    reader.stdout.close()
    assert sink.pull(sink.spec(peer.offer, range(16))).ok
    assert sink.holds(range(16), range(16))


_READER = """
import sys, threading
from array import array
from protocol.handoff import FabricOffer
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import PullSpec
from worker.transfer.ucx import UcxTransfer
transfer = UcxTransfer()
transfer.start(Arena(1024, 65536), LeaseTable(1), ScratchWords(1))
blocks = array("I", range(1024))
offer = FabricOffer("ucx", "", b"", 0, 0, host=sys.argv[1], port=int(sys.argv[2]))
ticket = transfer.pull(PullSpec(offer, blocks, blocks, 65536, 1, 77), lambda end: None)
pause = threading.Event()
while not ticket.num_bytes_done:
    pause.wait(0.002)
print("pulling", flush=True)
if len(sys.argv) == 3:
    pause.wait()
"""


def test_process_may_leave_without_a_stop(make_peer: PeerMaker) -> None:
    peer = make_peer(num_blocks=1024, throttle_bytes_per_s=24 << 20)
    command = [sys.executable, "-c", _READER, *map(str, place(peer.offer)), "leave"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"pulling\n", b"")


def test_nothing_of_the_library_is_loaded_or_left_behind() -> None:
    code = """
import os, sys
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.ucx import UcxTransfer, ucx_unavailable
assert ucx_unavailable() == "" and "ucxx" not in sys.modules
before = dict(os.environ)
transfer = UcxTransfer()
transfer.start(Arena(1, 64), LeaseTable(1), ScratchWords(1))
assert "ucxx" in sys.modules and dict(os.environ) == before
assert transfer.stop()
"""
    environ = {name: v for name, v in os.environ.items() if not name.startswith("UCX")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, cwd=ROOT, env=environ, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_idle_process_sleeps(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    begun, used = time.monotonic(), cpu_s(peer.pid)
    threading.Event().wait(4.0)
    assert (cpu_s(peer.pid) - used) / (time.monotonic() - begun) <= 0.03


def test_pull_from_ourselves(sink: Sink) -> None:
    sink.leases.write(0, 5)
    sink.arena.block(3)[:] = b"x" * 65536
    end = sink.pull(sink.spec(sink.transfer.offer(), [3], [4], slot=0, nonce=5))
    assert end.word == 5
    assert bytes(sink.arena.block(4)) == b"x" * 65536


def test_port_in_use_is_a_configuration_error(sink: Sink) -> None:
    port = place(sink.transfer.offer())[1]
    second = UcxTransfer(port=port)
    arena, leases = Arena(1, 64), LeaseTable(1)
    with pytest.raises(ConfigError, match=f"cannot serve KV over ucx on port {port}.*another"):
        second.start(arena, leases, ScratchWords(1))
    assert second.stop()
    arena.close()
    leases.close()


def test_where_it_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ucx_library.importlib.util, "find_spec", lambda name: None)
        assert "not installed" in ucx_unavailable()
        with pytest.raises(ConfigError, match="not installed"):
            UcxTransfer().start(Arena(1, 64), LeaseTable(1), ScratchWords(1))
    with pytest.raises(ConfigError, match="IPv4 only"):
        UcxTransfer(host="::1").start(Arena(1, 64), LeaseTable(1), ScratchWords(1))


@pytest.mark.parametrize(
    ("host", "advertise", "offered"),
    [("0.0.0.0", "127.0.0.1", "127.0.0.1"), ("0.0.0.0", "", None)],
)
def test_offer_is_an_address_others_can_connect_to(
    host: str, advertise: str, offered: str | None
) -> None:
    own = Sink(UcxTransfer(host=host, advertise_host=advertise))
    offer = own.transfer.offer()
    assert own.transfer.refuse(offer) == ""
    assert offered in (None, place(offer)[0])
    own.leases.write(0, 9)
    assert own.pull(own.spec(offer, [1], [2], slot=0, nonce=9)).word == 9
    assert own.close()


def test_offers_that_name_no_place_are_refused(sink: Sink) -> None:
    for host, port in (("a-name.example", 9), ("0.0.0.0", 9), ("127.0.0.1", 0), ("", 9)):
        offer = FabricOffer("ucx", "", b"", 0, 0, host=host, port=port)
        assert sink.transfer.refuse(offer) != ""
        end = sink.pull(sink.spec(offer, [1]))
        assert (end.ok, end.peer_gone, end.reason.split(":")[0]) == (False, False, "bad_request")
    assert sink.transfer.refuse(TcpOffer("127.0.0.1", 9)) == "not an offer of ucx"


def test_progress_is_seen_while_the_peer_is_slow(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(throttle_bytes_per_s=4 << 20)
    ticket, ends = sink.begin(sink.spec(peer.offer, range(64)))
    seen: set[int] = set()

    def grew() -> bool:
        seen.add(ticket.num_bytes_done)
        return len(seen) > 2

    until(grew)
    ticket.abort()
    assert not ends.wait().ok
    with pytest.raises(queue.Empty):
        ends.wait(0.05)

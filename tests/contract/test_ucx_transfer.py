"""What only `ucx` promises: strangers, silence and rubbish cost it nothing, and it sleeps when
nothing happens. What all transports promise is in `test_transfer_contract`."""

import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer, TcpOffer
from tests.contract.transfer_peer import content
from tests.contract.transfer_sink import ROOT, PeerProcess, Sink, until
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer import ucx_library
from worker.transfer.reactor import Broken
from worker.transfer.tcp_wire import Request, encode_request
from worker.transfer.ucx import UcxTransfer, ucx_unavailable
from worker.transfer.ucx_library import Library, Stream
from worker.transfer.ucx_listener import drop_silent

PeerMaker = Callable[..., PeerProcess]
GOOD = encode_request(Request(1, 2, 77, 65536))


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    peers: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        peers.append(PeerProcess("ucx", **options))
        peers[-1].ask("lend", slot=1, nonce=77)
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(UcxTransfer(connect_timeout_s=3.0))
    yield sink
    assert sink.close()


def place(offer: object) -> tuple[str, int]:
    assert isinstance(offer, FabricOffer)
    return offer.host, offer.port


class Stranger:
    """Somebody who speaks UCX, but not necessarily our protocol; driven by the test's thread."""

    def __init__(self) -> None:
        self.library = Library("lo")
        self.knocks: list[int] = []
        self.listener: Any = None

    def dial(self, peer: PeerProcess) -> Stream:
        return self.library.connect(*place(peer.offer))

    def listen(self) -> FabricOffer:
        self.listener = self.library.listen(0, self.knocks.append)
        return FabricOffer("ucx", "", b"", 0, 0, host="127.0.0.1", port=self.listener.port)

    def drive(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            while self.library.worker.progress_once():
                pass
            return condition()

        until(turned)

    def hear(self, stream: Stream, num_bytes: int) -> bytes:
        heard = stream.receive(bytearray(num_bytes))
        self.drive(heard.is_done)
        return bytes(heard.buffer)

    def is_closed(self, stream: Stream) -> bool:
        """The source says nothing, and then the end."""
        heard = stream.receive(bytearray(1))
        with pytest.raises(Broken):
            self.drive(heard.is_done)
        return heard.is_terminal()


def memory_kib(peer: PeerProcess, field: str = "VmHWM") -> int:
    status = Path(f"/proc/{peer.pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_rubbish_from_a_socket_changes_nothing(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer()
    rubbish = [b"GET / HTTP/1.1\r\n\r\n", random.Random(3).randbytes(100_000), b"\0", b"", GOOD]
    strangers = []
    for data in rubbish * 3:
        strangers.append(socket.create_connection(place(peer.offer), timeout=10.0))
        try:
            strangers[-1].sendall(data)
        except ConnectionError:
            pass
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))
    for stranger in strangers:
        stranger.close()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok


def test_rubbish_over_ucx_closes_its_own_connection_and_is_counted(
    make_peer: PeerMaker, sink: Sink
) -> None:
    peer, stranger = make_peer(), Stranger()
    rubbish = [
        random.Random(3).randbytes(100_000),
        b"BTKV" + bytes([99]) + GOOD[5:],
        encode_request(Request(1, 2**32 - 1, 77, 65536)),
        encode_request(Request(1, 65, 77, 65536)),
    ]
    for data in rubbish:
        stream = stranger.dial(peer)
        stream.send(data)
        assert stranger.is_closed(stream)
        stream.close()
    assert peer.ask("stats")["rubbish"] == len(rubbish)
    for half in (GOOD[:17], GOOD + b"\1\0"):
        stream = stranger.dial(peer)
        sent = stream.send(half)
        stranger.drive(sent.is_done)
        stream.close()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))


def test_flood_is_closed_before_it_piles_up(make_peer: PeerMaker, sink: Sink) -> None:
    peer, stranger = make_peer(), Stranger()
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    before = memory_kib(peer)
    flood = bytes(1 << 20)
    for first in (b"", GOOD + bytes(8)):
        stream = stranger.dial(peer)
        if first:
            stream.send(first)
        sends = [stream.send(flood) for _ in range(192)]
        stranger.drive(lambda sends=sends: all(send.is_terminal() for send in sends))  # type: ignore[misc]
        stream.close()
    until(lambda: peer.ask("stats")["rubbish"] == 2)
    assert memory_kib(peer) - before < 64 * 1024, "of 192 MiB each"
    assert sink.pull(sink.spec(peer.offer, range(64))).ok


def test_stranger_without_the_nonce_gets_no_byte_of_kv_and_no_nonce(make_peer: PeerMaker) -> None:
    peer, stranger = make_peer(), Stranger()
    stream = stranger.dial(peer)
    for nonce in (0, 76, 2**64 - 1):
        stream.send(encode_request(Request(1, 1, nonce, 65536)) + b"\5\0\0\0")
    heard = stranger.hear(stream, 3 * 16)
    assert (77).to_bytes(8, "little") not in heard
    assert peer.ask("stats")["refused"] == 3
    stream.close()


def test_word_is_read_when_nothing_refers_to_the_blocks_any_more(make_peer: PeerMaker) -> None:
    """A reader that takes nothing keeps most sends waiting, with the blocks not yet copied out."""
    peer, stranger = make_peer(), Stranger()
    stream = stranger.dial(peer)
    stream.send(encode_request(Request(1, 0, 77, 0)))
    stranger.hear(stream, 16 + 8)
    late = 0
    for turn in range(6):
        peer.ask("fill", version=turn)
        peer.ask("lend", slot=1, nonce=77)
        stream.send(encode_request(Request(1, 64, 77, 65536)))
        stream.send(array("I", range(64)).tobytes())
        until(lambda turn=turn: peer.ask("stats")["served"] == turn + 2)  # type: ignore[misc]
        peer.ask("revoke", slot=1)
        peer.ask("fill", version=99)
        data = stranger.hear(stream, 16 + 64 * 65536)[16:]
        word = int.from_bytes(stranger.hear(stream, 8), "little")
        is_right = data == b"".join(content(turn, block, 65536) for block in range(64))
        assert is_right or word == 0
        late += not is_right
    assert late > 0, "all was copied out at once: this run proves nothing"
    stream.close()


def test_who_says_nothing_is_dropped(make_peer: PeerMaker, sink: Sink) -> None:
    peer, stranger = make_peer(idle_timeout_s=0.2), Stranger()
    assert sink.pull(sink.spec(peer.offer, [1])).ok
    stream = stranger.dial(peer)
    stream.send(encode_request(Request(1, 0, 77, 0)))
    assert len(stranger.hear(stream, 16 + 8)) == 24  # an answer, then silence, then the end
    assert stranger.is_closed(stream)
    stream.close()
    assert sink.pull(sink.spec(peer.offer, [2])).ok, "on a new connection"


def test_sockets_that_never_say_a_word_are_shut_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            socket.create_connection(server.getsockname()) as silent,
            socket.create_connection(server.getsockname()) as speaker,
        ):
            speaker.sendall(b"x")
            accepted = [server.accept()[0], server.accept()[0]]
            assert accepted[1].recv(1) == b"x"
            seen = drop_silent(port, set())
            assert seen == {silent.getsockname()}
            assert drop_silent(port, seen) == set()
            silent.settimeout(5.0)
            assert silent.recv(1) == b""
            speaker.setblocking(False)
            with pytest.raises(BlockingIOError):
                speaker.recv(1)
            for sock in accepted:
                sock.close()


def test_idle_connections_make_room_and_others_wait(make_peer: PeerMaker, sink: Sink) -> None:
    peer, other, stranger = make_peer(max_connections=1), Sink(UcxTransfer()), Stranger()
    idle = [stranger.dial(peer) for _ in range(4)]
    sent = [stream.send(GOOD[:8]) for stream in idle]
    stranger.drive(sent[0].is_terminal)
    specs = [s.spec(peer.offer, range(n, n + 16)) for n in range(0, 64, 16) for s in (sink, other)]
    running = [(sink if n % 2 == 0 else other).begin(spec) for n, spec in enumerate(specs)]
    ends = [ended for _, ended in running]
    stranger.drive(lambda: all(not ended.is_empty() for ended in ends))
    assert all(ended.wait().ok for ended in ends)
    assert sink.holds(range(64), range(64))
    assert other.holds(range(64), range(64))
    assert peer.ask("stats")["evicted"] >= 4
    for stream in idle:
        stream.close()
    assert other.close()


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


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad", b"BTKV\1\0\0\0" + b"\xff" * 8])
def test_source_that_answers_rubbish_is_not_believed(sink: Sink, answer: bytes) -> None:
    source = Stranger()
    _, ends = sink.begin(sink.spec(source.listen(), [1]))
    source.drive(lambda: bool(source.knocks))
    stream = source.library.accept(source.listener, source.knocks[0])
    source.hear(stream, len(GOOD) + 4)
    stream.send(answer)
    source.drive(lambda: not ends.is_empty())
    end = ends.wait()
    assert (end.ok, end.reason.split(":")[0], end.num_bytes) == (False, "protocol", 0)
    assert sink.is_untouched(range(64))
    stream.close()


def test_source_that_speaks_without_being_asked_loses_its_connection(sink: Sink) -> None:
    source = Stranger()
    spec = sink.spec(source.listen(), [])
    _, ends = sink.begin(spec)
    source.drive(lambda: bool(source.knocks))
    stream = source.library.accept(source.listener, source.knocks[0])
    source.hear(stream, len(GOOD))
    stream.send(b"BTKV\1\0\0\0" + bytes(8) + (77).to_bytes(8, "little"))
    source.drive(lambda: not ends.is_empty())
    assert ends.wait().word == 77
    stream.send(bytes(16))
    assert source.is_closed(stream)


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
    assert sink.holds(range(16), range(16))


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


def test_listener_is_open_to_this_host_only(sink: Sink) -> None:
    port = place(sink.transfer.offer())[1]
    devices = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family == socket.AF_INET and sock.getsockname()[1] == port:
                    devices.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16))
        except OSError:
            continue
    assert devices == [b"lo\0"]


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

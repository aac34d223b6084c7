"""`ucx` among strangers: rubbish, silence, floods and guesses cost it nothing and gain nothing."""

import os
import random
import socket
from array import array
from collections.abc import Iterator

import pytest

from tests.contract.transfer_peer import content
from tests.contract.transfer_sink import Sink, until
from tests.contract.ucx_world import PeerMaker, Stranger, memory_kib, peers, place
from worker.transfer.tcp_wire import Request, encode_request
from worker.transfer.ucx import UcxTransfer
from worker.transfer.ucx_listener import drop_silent

GOOD = encode_request(Request(1, 2, 77, 65536))


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    yield from peers()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(UcxTransfer(connect_timeout_s=3.0))
    yield sink
    assert sink.close()


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

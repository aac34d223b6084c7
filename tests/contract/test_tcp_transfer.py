"""What only `tcp` promises: it survives strangers, and one peer's silence is nobody else's."""

import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from protocol.errors import ConfigError
from protocol.handoff import TcpOffer
from tests.contract.transfer_sink import PeerProcess, Sink, until
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.tcp import TcpTransfer
from worker.transfer.tcp_wire import Request, encode_request

PeerMaker = Callable[..., PeerProcess]


@pytest.fixture
def make_peer() -> Iterator[PeerMaker]:
    peers: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        peers.append(PeerProcess("tcp", **options))
        peers[-1].ask("lend", slot=1, nonce=77)
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink(TcpTransfer(num_threads=1, connect_timeout_s=0.4))
    yield sink
    assert sink.close()


def dial(peer: PeerProcess) -> socket.socket:
    assert isinstance(peer.offer, TcpOffer)
    return socket.create_connection((peer.offer.host, peer.offer.port), timeout=10.0)


def heard_until_closed(sock: socket.socket) -> bytes:
    heard = b""
    try:
        while part := sock.recv(65536):
            heard += part
    except ConnectionResetError:
        pass
    return heard


def test_rubbish_closes_its_own_connection_and_is_counted(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer()
    good = encode_request(Request(1, 2, 77, 65536))
    rubbish = [
        b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n",
        random.Random(3).randbytes(100_000),
        b"BTKV" + bytes([99]) + good[5:],
        encode_request(Request(1, 2**32 - 1, 77, 65536)),
        encode_request(Request(1, 65, 77, 65536)),
    ]
    for data in rubbish:
        with dial(peer) as sock:
            try:
                sock.sendall(data)
            except ConnectionError:
                pass
            assert heard_until_closed(sock) == b""
    until(lambda: peer.ask("stats")["rubbish"] == len(rubbish))
    with dial(peer) as sock:
        sock.sendall(good[:17])
    with dial(peer) as sock:
        sock.sendall(good + b"\1\0")
    assert sink.pull(sink.spec(peer.offer, range(64))).ok
    assert sink.holds(range(64), range(64))


def test_stranger_without_the_nonce_gets_no_byte_of_kv_and_no_nonce(make_peer: PeerMaker) -> None:
    peer = make_peer()
    with dial(peer) as sock:
        for nonce in (0, 76, 2**64 - 1):
            sock.sendall(encode_request(Request(1, 1, nonce, 65536)) + b"\5\0\0\0")
        sock.shutdown(socket.SHUT_WR)
        heard = heard_until_closed(sock)
    assert len(heard) == 3 * 16
    assert (77).to_bytes(8, "little") not in heard
    assert peer.ask("stats")["refused"] == 3


def test_other_block_size_is_refused_but_is_no_sign_of_death(
    make_peer: PeerMaker, sink: Sink
) -> None:
    peer = make_peer(block_bytes=1024)
    end = sink.pull(sink.spec(peer.offer, [1]))
    assert (end.ok, end.peer_gone, end.word) == (False, False, None)
    assert end.reason.startswith("refused")


def test_connection_that_asks_nothing_is_closed(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(idle_timeout_s=0.2)
    assert sink.pull(sink.spec(peer.offer, [1])).ok
    with dial(peer) as sock:
        sock.sendall(encode_request(Request(1, 0, 77, 0)))
        assert len(heard_until_closed(sock)) == 16 + 8  # an answer, then silence, then the end
    assert sink.pull(sink.spec(peer.offer, [2])).ok, "on a new connection"


def test_idle_connections_make_room_for_new_ones(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(max_connections=3)
    idle = [dial(peer) for _ in range(8)]
    end = sink.pull(sink.spec(peer.offer, range(8)))
    assert end.ok
    stats = peer.ask("stats")
    assert stats["evicted"] >= 5
    for sock in idle:
        sock.close()


def test_pulls_over_the_connection_bound_wait_and_succeed(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(max_connections=1)
    other = Sink(TcpTransfer())
    specs = [s.spec(peer.offer, range(n, n + 8)) for n in range(0, 64, 8) for s in (sink, other)]
    running = [(sink if n % 2 == 0 else other).begin(spec) for n, spec in enumerate(specs)]
    assert all(ends.wait().ok for _, ends in running)
    assert sink.holds(range(64), range(64))
    assert other.holds(range(64), range(64))
    assert other.close()


def test_frozen_peer_does_not_keep_others_waiting(make_peer: PeerMaker, sink: Sink) -> None:
    frozen, well = make_peer(), make_peer()
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


def test_place_that_does_not_answer_is_given_up(sink: Sink) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        crowd = []
        for _ in range(3):  # the backlog is full now: nobody else is answered
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(address)
            crowd.append(sock)
        end = sink.pull(sink.spec(TcpOffer(*address), [1]))
        for sock in crowd:
            sock.close()
    assert (end.ok, end.peer_gone, end.reason.split(":")[0]) == (False, True, "timeout")


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"BTKV\1\0\0\0" + b"\xff" * 8]
)
def test_source_that_answers_rubbish_is_not_believed(sink: Sink, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(answer)
                heard_until_closed(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        end = sink.pull(sink.spec(TcpOffer(*server.getsockname()), [1]))
        thread.join()
    assert (end.ok, end.reason.split(":")[0], end.num_bytes) == (False, "protocol", 0)
    assert sink.is_untouched([n for n in range(64) if n != 1])


def test_pull_from_ourselves(sink: Sink) -> None:
    sink.leases.write(0, 5)
    sink.arena.block(3)[:] = b"x" * 65536
    end = sink.pull(sink.spec(sink.transfer.offer(), [3], [4], slot=0, nonce=5))
    assert end.word == 5
    assert bytes(sink.arena.block(4)) == b"x" * 65536


def test_port_in_use_is_a_configuration_error(sink: Sink) -> None:
    offer = sink.transfer.offer()
    assert isinstance(offer, TcpOffer)
    second = TcpTransfer(port=offer.port)
    arena, leases = Arena(1, 64), LeaseTable(1)
    with pytest.raises(ConfigError, match=f"cannot serve KV on 127.0.0.1:{offer.port}"):
        second.start(arena, leases, ScratchWords(1))
    assert second.stop()
    arena.close()
    leases.close()


@pytest.mark.parametrize(
    ("host", "advertise", "offered"),
    [("127.0.0.1", "", "127.0.0.1"), ("0.0.0.0", "127.0.0.1", "127.0.0.1"), ("0.0.0.0", "", None)],
)
def test_offer_is_an_address_others_can_connect_to(
    host: str, advertise: str, offered: str | None
) -> None:
    own = Sink(TcpTransfer(host=host, advertise_host=advertise))
    offer = own.transfer.offer()
    assert isinstance(offer, TcpOffer)
    assert own.transfer.refuse(offer) == ""
    assert offered in (None, offer.host)
    own.leases.write(0, 9)
    assert own.pull(own.spec(offer, [1], [2], slot=0, nonce=9)).word == 9
    assert own.close()


def test_progress_is_seen_while_the_peer_is_slow(make_peer: PeerMaker, sink: Sink) -> None:
    peer = make_peer(throttle_bytes_per_s=2 << 20)
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

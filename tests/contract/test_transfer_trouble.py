"""What every built-in transport promises when the other end dies, freezes or comes back, and when
we give up or leave."""

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from protocol.errors import LocalError
from protocol.handoff import FabricOffer, ShmOffer, TcpOffer
from tests.contract.transfer_sink import Ends, altered, until
from tests.contract.transfer_world import (
    LARGE,
    ONE_SIDED,
    TRANSPORTS,
    PeerMaker,
    SinkMaker,
    SlowPair,
    chosen,
    peers,
    sinks,
    slow_pair,
)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return chosen(request.param, monkeypatch)


@pytest.fixture
def make_peer(transport: str) -> Iterator[PeerMaker]:
    yield from peers(transport)


@pytest.fixture
def make_sink(transport: str) -> Iterator[SinkMaker]:
    yield from sinks(transport)


@pytest.fixture
def make_slow_pair(transport: str, make_peer: PeerMaker, make_sink: SinkMaker) -> SlowPair:
    return slow_pair(transport, make_peer, make_sink)


def test_peer_that_died_before_the_pull_ends_it_at_once(
    make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.kill()
    assert sink.transfer.refuse(peer.offer) == "", "only the pull says that the peer is gone"
    begun = time.monotonic()
    end = sink.pull(sink.spec(peer.offer, range(4)))
    assert time.monotonic() - begun < 2.0
    assert (end.ok, end.peer_gone) == (False, True)
    assert sink.word(sink.spec(peer.offer, [])) is None


def test_peer_killed_in_the_middle_of_a_pull(transport: str, make_slow_pair: SlowPair) -> None:
    peer, sink = make_slow_pair()
    blocks = range(256 if transport == "shm" else LARGE)
    spec = sink.spec(peer.offer, blocks)
    ticket, ends = sink.begin(spec)
    until(lambda: ticket.num_bytes_done > 0)
    peer.kill()
    killed = time.monotonic()
    end = ends.wait()
    assert time.monotonic() - killed < 2.0
    if transport != "shm":
        assert (end.ok, end.peer_gone) == (False, True)
        assert end.num_bytes < LARGE * 65536
    else:
        # Its memory lives as long as it is mapped, and nobody can change it any more.
        assert end.ok
        assert sink.holds(blocks, blocks)
        assert sink.word(spec) == 77


def test_frozen_peer(transport: str, make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    peer.freeze()
    spec = sink.spec(peer.offer, range(16))
    _, ends = sink.begin(spec)
    if transport != "shm":
        with pytest.raises(queue.Empty):
            ends.wait(0.5)
        assert sink.transfer.num_live() == 1
        # NIXL may have copied already (CMA), but says nothing before it was connected.
        assert transport == "nixl" or sink.is_untouched(range(64))
        peer.thaw()
    end = ends.wait()
    assert end.ok
    assert sink.holds(range(16), range(16))
    assert sink.word(spec, end) == 77
    assert sink.transfer.num_live() == 0


def test_peer_frozen_in_the_middle_completes_with_the_right_data(
    make_slow_pair: SlowPair,
) -> None:
    peer, sink = make_slow_pair()
    spec = sink.spec(peer.offer, range(256))
    ticket, ends = sink.begin(spec)
    until(lambda: ticket.num_bytes_done > 0)
    peer.freeze()
    assert ends.is_empty()
    peer.thaw()
    end = ends.wait()
    assert end.ok
    assert sink.holds(range(256), range(256))
    assert sink.word(spec, end) == 77


def test_what_nobody_waits_for_any_more_lands_until_its_end(
    make_slow_pair: SlowPair,
) -> None:
    peer, sink = make_slow_pair()
    ticket, ends = sink.begin(sink.spec(peer.offer, range(256)))
    until(lambda: ticket.num_bytes_done > 0)
    assert sink.transfer.num_live() == 1
    sink.arena.block(255)[:] = bytes(65536)  # given up: but the block is not free yet
    ends.wait()
    assert sink.holds([255], [255]), "this is why blocks are quarantined until the end"
    assert sink.transfer.num_live() == 0


def test_nothing_lands_after_the_end_of_an_aborted_pull(
    make_slow_pair: SlowPair,
) -> None:
    peer, sink = make_slow_pair()
    ticket, ends = sink.begin(sink.spec(peer.offer, range(LARGE - 1)))
    until(lambda: ticket.num_bytes_done > 0)
    begun = time.monotonic()
    ticket.abort()
    end = ends.wait()
    assert time.monotonic() - begun < 2.0
    assert (end.ok, end.reason.split(":")[0], end.peer_gone) == (False, "aborted", False)
    sink.arena.memory[:] = b"\xee" * sink.arena.nbytes
    assert sink.pull(sink.spec(peer.offer, [LARGE - 1])).ok, "the peer went on"
    assert sink.is_untouched(range(LARGE - 1))
    ticket.abort()
    assert ends.is_empty(), "ended once"


def test_successor_of_a_dead_peer_does_not_serve_its_handles(
    transport: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    first, sink = make_peer(), make_sink()
    first.ask("lend", slot=1, nonce=77)
    old = sink.spec(first.offer, range(4))
    for _ in range(4):
        assert sink.pull(old).ok  # connections are pooled, memory is mapped
    first.kill()
    if isinstance(first.offer, TcpOffer) or transport == "ucx":
        assert not isinstance(first.offer, ShmOffer)
        second = make_peer(port=first.offer.port)
        offer = second.offer
        assert offer == first.offer
    elif isinstance(first.offer, FabricOffer):
        second = make_peer()
        offer = second.offer
    else:
        second = make_peer()
        assert isinstance(second.offer, ShmOffer)
        assert isinstance(first.offer, ShmOffer)
        offer = second.offer
        # As if the pid had come back: the process is there, the token is another's.
        old = sink.spec(altered(offer, token=first.offer.token), range(4))
    second.ask("fill", version=9)
    second.ask("lend", slot=1, nonce=88)
    end = sink.pull(old)
    assert not end.ok
    assert end.peer_gone is (transport in ONE_SIDED)
    new = sink.spec(offer, range(4), nonce=88)
    end = sink.pull(new)
    assert end.ok
    assert sink.word(new, end) == 88
    assert sink.holds(range(4), range(4), version=9)


def test_stop_ends_what_runs_and_nothing_lands_after(
    make_slow_pair: SlowPair,
) -> None:
    peer, sink = make_slow_pair()
    specs = [sink.spec(peer.offer, range(n, LARGE, 8)) for n in range(8)]
    running = [sink.begin(spec) for spec in specs]
    until(lambda: running[0][0].num_bytes_done > 0)
    assert sink.transfer.stop()
    sink.arena.memory[:] = b"\xee" * sink.arena.nbytes
    reasons = {ends.wait(0.1).reason.split(":")[0] for _, ends in running}
    assert reasons == {"stopped"}
    assert sink.transfer.num_live() == 0
    assert sink.is_untouched(range(LARGE))


def test_stop_while_others_submit_ends_every_operation_once(
    make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    assert sink.pull(sink.spec(peer.offer, [0])).ok
    begun: list[Ends] = []
    refused = threading.Semaphore(0)

    def submit(number: int) -> None:
        try:
            while True:
                ends = Ends()
                sink.transfer.pull(sink.spec(peer.offer, [number]), ends)
                begun.append(ends)
        except LocalError:
            refused.release()

    threads = [threading.Thread(target=submit, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(begun) > 20)
    assert sink.transfer.stop()
    for thread in threads:
        assert refused.acquire(timeout=20.0)
        thread.join()
    assert {ends.wait(0.1).reason.split(":")[0] for ends in begun} <= {"", "stopped"}
    assert all(ends.is_empty() for ends in begun), "ended once"
    assert sink.transfer.num_live() == 0


def test_callback_that_raises_harms_no_other_operation(
    make_peer: PeerMaker, make_sink: SinkMaker, caplog: pytest.LogCaptureFixture
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)

    def raises(end: object) -> None:
        raise ValueError("of the caller")

    for _ in range(3):
        sink.transfer.pull(sink.spec(peer.offer, [1]), raises)
    until(lambda: caplog.text.count("on_end of a transfer raised") == 3)
    assert sink.transfer.num_live() == 0
    assert sink.pull(sink.spec(peer.offer, [2])).ok

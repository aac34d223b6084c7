"""What every built-in transport promises, between two real processes: we pull, the peer serves.
What happens in trouble is in `test_transfer_trouble`."""

import random
import time
from collections.abc import Iterator

import pytest

from protocol.handoff import FabricOffer, Offer, ShmOffer, TcpOffer
from tests.contract.transfer_sink import altered, until
from tests.contract.transfer_world import (
    LARGE,
    ONE_SIDED,
    OWN_THREADS,
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


def test_contiguous_blocks_arrive_with_the_word(make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    spec = sink.spec(peer.offer, range(8, 40), range(32))
    assert sink.transfer.refuse(peer.offer) == ""
    ticket, ends = sink.begin(spec)
    end = ends.wait()
    assert (end.ok, end.reason, end.peer_gone) == (True, "", False)
    assert end.num_bytes == ticket.num_bytes_done == 32 * 65536
    assert end.seconds > 0
    assert sink.holds(range(32), range(8, 40))
    assert sink.is_untouched(range(32, 64))
    assert sink.word(spec, end) == 77
    assert sink.word(spec) == 77
    assert sink.transfer.num_live() == 0


def test_scattered_blocks_arrive_in_their_places(
    make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    rng = random.Random(5)
    for _ in range(20):
        count = rng.randrange(1, 50)
        remote, local = rng.sample(range(64), count), rng.sample(range(64), count)
        assert sink.pull(sink.spec(peer.offer, remote, local)).ok
        assert sink.holds(local, remote)


def test_no_blocks_is_a_pull_that_ends_well(make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    end = sink.pull(sink.spec(peer.offer, []))
    assert end.ok
    assert end.num_bytes == 0
    assert sink.is_untouched(range(64))


def test_large_pull_arrives_whole(make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(num_blocks=LARGE), make_sink(LARGE)
    peer.ask("lend", slot=1, nonce=2**64 - 1)
    local = list(range(LARGE))
    random.Random(1).shuffle(local)
    spec = sink.spec(peer.offer, range(LARGE), local, nonce=2**64 - 1)
    end = sink.pull(spec)
    assert end.num_bytes == LARGE * 65536
    assert sink.holds(local, range(LARGE))
    assert sink.word(spec, end) == 2**64 - 1


@pytest.mark.parametrize(("slot", "nonce"), [(1, 78), (2, 77), (5, 0), (4_000_000_000, 77)])
def test_wrong_slot_or_nonce_never_passes_the_check(
    make_peer: PeerMaker, make_sink: SinkMaker, transport: str, slot: int, nonce: int
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    spec = sink.spec(peer.offer, range(4), slot=slot, nonce=nonce)
    end = sink.pull(spec)
    assert not end.peer_gone
    if transport not in ONE_SIDED:
        assert (end.ok, end.word, end.num_bytes) == (False, 0, 0)
        assert end.reason.startswith("lease_lost")
        assert sink.is_untouched(range(64))
    word = sink.word(spec, end)
    assert not word if nonce == 0 else word != nonce
    assert sink.pull(sink.spec(peer.offer, range(4))).ok, "the peer still serves the others"


@pytest.mark.parametrize(
    ("remote", "local"), [([64], [0]), ([0], [64]), ([2**32 - 1], [0]), ([1, 2], [1])]
)
def test_blocks_that_do_not_exist_are_not_copied(
    make_peer: PeerMaker, make_sink: SinkMaker, remote: list[int], local: list[int]
) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    end = sink.pull(sink.spec(peer.offer, remote, local))
    assert (end.ok, end.peer_gone, end.num_bytes) == (False, False, 0)
    assert sink.is_untouched(range(64))


def test_word_zeroed_during_the_pull_is_seen(
    make_slow_pair: SlowPair,
) -> None:
    peer, sink = make_slow_pair()
    spec = sink.spec(peer.offer, range(256))
    ticket, ends = sink.begin(spec)
    until(lambda: ticket.num_bytes_done > 0)
    peer.ask("revoke", slot=1)
    assert ends.is_empty(), "too fast to act in the middle"
    end = ends.wait()
    assert end.ok
    assert sink.word(spec, end) == 0


def test_many_pulls_at_once_from_two_sources(make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peers, sink = [make_peer(), make_peer()], make_sink()
    for peer in peers:
        for slot in range(8):
            peer.ask("lend", slot=slot, nonce=100 + slot)
    running = []
    for number in range(32):
        blocks = [number * 2, number * 2 + 1]
        spec = sink.spec(peers[number % 2].offer, blocks, slot=number % 8, nonce=100 + number % 8)
        running.append((spec, blocks, *sink.begin(spec)))
    for spec, blocks, _, ends in running:
        end = ends.wait()
        assert end.ok
        assert sink.word(spec, end) == spec.nonce
        assert sink.holds(blocks, blocks)
        assert all(name.startswith(OWN_THREADS) for name in ends.threads)
    assert sink.transfer.num_live() == 0


def test_foreign_offers_are_refused(make_peer: PeerMaker, make_sink: SinkMaker) -> None:
    peer, sink = make_peer(), make_sink()
    peer.ask("lend", slot=1, nonce=77)
    others: list[Offer] = [FabricOffer("nixl", "agent", b"", 0, 0)]
    if isinstance(peer.offer, ShmOffer):
        others += [
            TcpOffer("127.0.0.1", 9),
            altered(peer.offer, boot_id="another"),
            altered(peer.offer, machine="aarch64"),
            altered(peer.offer, lease_bytes=8),
        ]
    else:
        others += [
            ShmOffer("", 1, 1, 1, 1, 1, ""),
            TcpOffer("a-name.example", 9),
            TcpOffer("0.0.0.0", 9),
            TcpOffer("127.0.0.1", 0),
        ]
    for offer in others:
        assert sink.transfer.refuse(offer) != ""
        if offer.__class__ is not peer.offer.__class__:
            end = sink.pull(sink.spec(offer, [1]))
            assert (end.ok, end.peer_gone) == (False, False)
    assert sink.is_untouched(range(64))


@pytest.mark.timeout(50)
def test_no_stale_pull_is_accepted_under_random_revocation(
    make_peer: PeerMaker, make_sink: SinkMaker
) -> None:
    peer, sink = make_peer(), make_sink(32)
    rng = random.Random(2026)
    num_bytes = 32 * 65536
    limit = time.monotonic() + 5.0
    hold_s, accepted, caught, stale, stale_unchecked = 0.002, 0, 0, 0, 0
    rounds = 0
    while rounds < 600 and (rounds < 300 or time.monotonic() < limit):
        rounds += 1
        nonce, byte = rng.randrange(1, 2**64), 1 + rounds % 250
        peer.say(
            "round", slot=1, nonce=nonce, byte=byte, num_bytes=num_bytes,
            hold_s=rng.uniform(0, 2 * hold_s),
        )  # fmt: skip
        assert peer.hear() == "lent"
        spec = sink.spec(peer.offer, range(32), nonce=nonce)
        end = sink.pull(spec)
        word = sink.word(spec, end)
        is_right = bytes(sink.arena.memory) == bytes([byte]) * num_bytes
        assert peer.hear() is None
        if end.ok:
            hold_s += (min(0.05, end.seconds) - hold_s) * 0.1
            stale_unchecked += not is_right
        if end.ok and word == nonce:
            accepted += 1
            stale += not is_right
        else:
            caught += 1
    assert stale == 0
    assert stale_unchecked > 0, "the word was never needed: this run proves nothing"
    assert accepted > rounds // 20
    assert caught > 0

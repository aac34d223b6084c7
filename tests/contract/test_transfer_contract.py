"""What every built-in transport promises, between two real processes: we pull, the peer serves."""

import itertools
import os
import queue
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from protocol.handoff import FabricOffer, Offer, ShmOffer, TcpOffer
from tests.contract.transfer_sink import PeerProcess, Sink, altered, until
from worker.transfer.base import Transfer
from worker.transfer.nixl import NixlTransfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer
from worker.transfer.ucx import UcxTransfer

LARGE = 1024
"""Blocks of 64 KiB: more than any socket buffer holds."""
SLOW = 24 << 20
"""Bytes per second at which "in the middle of a pull" lasts long enough to act in it."""
PeerMaker = Callable[..., PeerProcess]
SinkMaker = Callable[..., Sink]


ONE_SIDED = ("shm", "nixl", "nixl-tcp")
"""The source does nothing; the pace of a pull is the sink's."""
OWN_THREADS = ("shm-copy", "tcp-transfer", "nixl-agent", "ucx-transfer")
_agents = itertools.count()


@pytest.fixture(params=["shm", "tcp", "nixl", "nixl-tcp", "ucx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """UCX's choice of ways is read when an agent is made, here and in the source's process."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    if request.param == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return str(request.param)


def build(transport: str, **options: Any) -> Transfer:
    if transport == "shm":
        return ShmTransfer(**options)
    if transport.startswith("nixl"):
        return NixlTransfer(agent_name=f"sink.{os.getpid()}.{next(_agents)}", **options)
    return UcxTransfer(**options) if transport == "ucx" else TcpTransfer(**options)


@pytest.fixture
def make_peer(transport: str) -> Iterator[PeerMaker]:
    peers: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        peers.append(PeerProcess(transport, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def make_sink(transport: str) -> Iterator[SinkMaker]:
    sinks: list[Sink] = []

    def make(num_blocks: int = 64, **options: Any) -> Sink:
        sinks.append(Sink(build(transport, **options), num_blocks))
        return sinks[-1]

    yield make
    for sink in sinks:
        assert sink.close(), "an operation was live at the end of the test"


@pytest.fixture
def make_slow_pair(
    transport: str, make_peer: PeerMaker, make_sink: SinkMaker
) -> Callable[[], tuple[PeerProcess, Sink]]:
    """A source and a sink between which `LARGE` blocks take seconds; who copies is throttled."""

    def make() -> tuple[PeerProcess, Sink]:
        at_source = {} if transport in ONE_SIDED else {"throttle_bytes_per_s": SLOW}
        at_sink = {"throttle_bytes_per_s": SLOW} if transport in ONE_SIDED else {}
        peer = make_peer(num_blocks=LARGE, **at_source)
        peer.ask("lend", slot=1, nonce=77)
        return peer, make_sink(LARGE, **at_sink)

    return make


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
    make_slow_pair: Callable[[], tuple[PeerProcess, Sink]],
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


def test_peer_killed_in_the_middle_of_a_pull(
    transport: str, make_slow_pair: Callable[[], tuple[PeerProcess, Sink]]
) -> None:
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
    make_slow_pair: Callable[[], tuple[PeerProcess, Sink]],
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
    make_slow_pair: Callable[[], tuple[PeerProcess, Sink]],
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
    make_slow_pair: Callable[[], tuple[PeerProcess, Sink]],
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


def test_stop_ends_what_runs_and_nothing_lands_after(
    make_slow_pair: Callable[[], tuple[PeerProcess, Sink]],
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

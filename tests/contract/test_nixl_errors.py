"""What is wrong with an offer, an installation or NIXL itself: said in one line, and nobody else is
harmed."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from protocol.errors import ConfigError
from protocol.handoff import FabricOffer
from tests.contract.nixl_world import (
    LARGE,
    SLOW,
    WAYS,
    PeerMaker,
    SinkMaker,
    names,
    offer_of,
    peers,
    sinks,
    taken,
)
from tests.contract.transfer_sink import Sink, until
from worker.transfer.nixl import NixlTransfer


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
        {"arena_address": -65536},
        {"arena_address": (1 << 64) - 8},
        {"lease_address": -8},
        {"lease_bytes": -8},
        {"device": -1},
        {"device": 1 << 40},
        {"agent": "x" * 10_000, "metadata": good.metadata + b"x" * 10_000},
        {"metadata": good.metadata + bytes(8 << 20)},
    ]
    for change in changes:
        block = 64 if "arena_bytes" in change else 63
        end = sink.pull(sink.spec(msgspec.structs.replace(good, **change), [block], [63]))
        assert (end.ok, end.peer_gone, end.num_bytes) == (False, False, 0), change
        assert end.reason.startswith("bad_request"), change
        assert len(end.reason) < 200, change
    for change in ({"metadata": b""}, {"agent": ""}, {"backend": "nixl/OBJ"}, {"kind": "tape"}):
        offer = msgspec.structs.replace(good, **change)
        assert sink.transfer.refuse(offer) != ""
        assert sink.pull(sink.spec(offer, [63])).reason.startswith("bad_request")
    assert running.wait().ok
    assert sink.holds(range(32), range(32))
    assert sink.is_untouched(range(32, 64))
    assert sink.pull(sink.spec(good, [63])).ok


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


def test_error_outside_of_all_operations_still_ends_those_that_come(
    way: str, make_peer: PeerMaker, make_sink: SinkMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, sink = make_peer(), make_sink()
    assert sink.pull(sink.spec(peer.offer, [0])).ok
    transfer = sink.transfer
    assert isinstance(transfer, NixlTransfer)
    thread = transfer._thread
    assert thread is not None
    with monkeypatch.context() as patch:
        patch.setattr(thread, "_turn", lambda now: 1 // 0)
        running = sink.begin(sink.spec(peer.offer, range(64)))[1]
        until(lambda: thread.failure != "")
    assert running.wait().reason == "internal: ZeroDivisionError in the nixl thread"
    assert "ZeroDivisionError" in transfer.refuse(peer.offer)
    assert sink.pull(sink.spec(peer.offer, [0])).reason.startswith("bad_request: internal")
    assert transfer.num_live() == 0


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
        Sink(NixlTransfer(agent_name=next(names)))

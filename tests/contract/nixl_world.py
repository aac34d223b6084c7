"""Sources and sinks over nixl, on either of its ways on one host: CMA and plain TCP."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from protocol.handoff import FabricOffer
from tests.contract.transfer_sink import PeerProcess, Sink
from worker.transfer.nixl import NixlTransfer

LARGE = 1024
SLOW = 24 << 20
"""Bytes per second at which "in the middle of a pull" lasts long enough to act in it."""
WAYS = ("cma", "tcp")
names = (f"sink.{os.getpid()}.x{n}" for n in itertools.count())
"""Of agents."""
PeerMaker = Callable[..., PeerProcess]
SinkMaker = Callable[..., Sink]


def taken(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX reads when an agent is made, here and in the source's process."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    if way == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return way


def peers() -> Iterator[PeerMaker]:
    """For a fixture: makes sources that lend slot 1 under the nonce 77."""
    made: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        made.append(PeerProcess("nixl", **options))
        made[-1].ask("lend", slot=1, nonce=77)
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def sinks() -> Iterator[SinkMaker]:
    """For a fixture."""
    made: list[Sink] = []

    def make(num_blocks: int = 64, **options: Any) -> Sink:
        made.append(Sink(NixlTransfer(agent_name=next(names), **options), num_blocks))
        return made[-1]

    yield make
    for sink in made:
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

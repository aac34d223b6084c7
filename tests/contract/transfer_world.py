"""The transports of the contract suite, and pairs of a source and a sink for each of them."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract.transfer_sink import PeerProcess, Sink
from worker.transfer.base import Transfer
from worker.transfer.nixl import NixlTransfer
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer
from worker.transfer.ucx import UcxTransfer

TRANSPORTS = ("shm", "tcp", "nixl", "nixl-tcp", "ucx")
LARGE = 1024
"""Blocks of 64 KiB: more than any socket buffer holds."""
SLOW = 24 << 20
"""Bytes per second at which "in the middle of a pull" lasts long enough to act in it."""
ONE_SIDED = ("shm", "nixl", "nixl-tcp")
"""The source does nothing; the pace of a pull is the sink's."""
OWN_THREADS = ("shm-copy", "tcp-transfer", "nixl-agent", "ucx-transfer")
PeerMaker = Callable[..., PeerProcess]
SinkMaker = Callable[..., Sink]
SlowPair = Callable[[], tuple[PeerProcess, Sink]]
_agents = itertools.count()


def chosen(transport: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """UCX's choice of ways is read when an agent is made, here and in the source's process."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    if transport == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return transport


def build(transport: str, **options: Any) -> Transfer:
    if transport == "shm":
        return ShmTransfer(**options)
    if transport.startswith("nixl"):
        return NixlTransfer(agent_name=f"sink.{os.getpid()}.{next(_agents)}", **options)
    return UcxTransfer(**options) if transport == "ucx" else TcpTransfer(**options)


def peers(transport: str) -> Iterator[PeerMaker]:
    """For a fixture."""
    made: list[PeerProcess] = []

    def make(**options: Any) -> PeerProcess:
        made.append(PeerProcess(transport, **options))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def sinks(transport: str) -> Iterator[SinkMaker]:
    """For a fixture."""
    made: list[Sink] = []

    def make(num_blocks: int = 64, **options: Any) -> Sink:
        made.append(Sink(build(transport, **options), num_blocks))
        return made[-1]

    yield make
    for sink in made:
        assert sink.close(), "an operation was live at the end of the test"


def slow_pair(transport: str, make_peer: PeerMaker, make_sink: SinkMaker) -> SlowPair:
    """A source and a sink between which `LARGE` blocks take seconds; who copies is throttled."""

    def make() -> tuple[PeerProcess, Sink]:
        at_source = {} if transport in ONE_SIDED else {"throttle_bytes_per_s": SLOW}
        at_sink = {"throttle_bytes_per_s": SLOW} if transport in ONE_SIDED else {}
        peer = make_peer(num_blocks=LARGE, **at_source)
        peer.ask("lend", slot=1, nonce=77)
        return peer, make_sink(LARGE, **at_sink)

    return make

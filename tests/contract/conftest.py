"""Fixtures of the contract suites."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.contract.bus_worlds import MemoryWorld, NatsWorld, Serve, World
from tests.contract.nats_server import NatsServer


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made: World = MemoryWorld() if request.param == "memory" else NatsWorld(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Servers of this test's own."""
    servers: list[NatsServer] = []

    def start(config: str) -> NatsServer:
        servers.append(NatsServer(tmp_path, config))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()

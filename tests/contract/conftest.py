"""Fixtures of the contract suites."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.bus_worlds import MemoryWorld, NatsWorld, World


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made: World = MemoryWorld() if request.param == "memory" else NatsWorld(tmp_path)
    yield made
    await made.close()

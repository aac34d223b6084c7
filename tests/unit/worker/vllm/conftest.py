"""One stand-in for a file of tests, and a started engine beside it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.unit.worker.vllm.vllm_world import Standin, World, standin, started, world_of
from worker.engine.vllm.engine import VllmEngine


@pytest.fixture(scope="module")
def shared() -> Iterator[Standin]:
    with standin() as process:
        yield process


@pytest.fixture
async def world(shared: Standin) -> AsyncIterator[World]:
    async with world_of(shared) as world:
        yield world


@pytest.fixture
async def engine(world: World) -> AsyncIterator[VllmEngine]:
    async with started(world) as engine:
        yield engine

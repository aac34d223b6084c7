"""Whether the worker that holds our name is alive: no answer counts only if the bus was there."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from protocol.bus import Message
from protocol.codec import encode
from protocol.errors import BusError, BusTimeout
from protocol.jobs import Pong
from protocol.memory_bus import MemoryBus, MemoryHub
from tests.unit.worker.service_world import SUBJECTS, info_of
from worker import main
from worker.main import _pinger

TWIN = info_of("both")
JOBS = SUBJECTS.jobs(TWIN.worker_id, TWIN.incarnation)


class World:
    """A newcomer and its twin, each with a connection of its own."""

    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.bus, self.twin = MemoryBus(self.hub), MemoryBus(self.hub)
        self.is_alive = _pinger(self.bus, SUBJECTS)

    async def answer(self, *, incarnation: str) -> None:
        """What the twin does with questions; silent with an empty one."""

        def on_job(message: Message) -> None:
            if incarnation:
                self.twin.publish(message.reply, encode(Pong(TWIN.worker_id, incarnation)))

        await self.twin.subscribe(JOBS, on_job)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(main, "PING_TIMEOUT_S", 0.1)
    world = World()
    await world.bus.start()
    await world.twin.start()
    yield world
    await world.bus.close()
    await world.twin.close()


async def test_an_answer_of_that_very_process_is_life(world: World) -> None:
    await world.answer(incarnation=TWIN.incarnation)
    assert await world.is_alive(TWIN)
    await world.bus.flush(timeout_s=1.0)
    assert not await world.is_alive(replace(TWIN, incarnation="other"))


async def test_nobody_or_nothing_on_a_bus_that_is_there_is_none(world: World) -> None:
    assert not await world.is_alive(TWIN)
    await world.answer(incarnation="")
    assert not await world.is_alive(TWIN)


async def test_a_bus_that_is_away_says_nothing_about_the_twin(world: World) -> None:
    await world.answer(incarnation=TWIN.incarnation)
    world.hub.down()
    with pytest.raises(BusError) as caught:
        await world.is_alive(TWIN)
    assert not isinstance(caught.value, BusTimeout), "not even asked"
    world.hub.up()
    assert await world.is_alive(TWIN)


async def test_a_bus_that_goes_away_meanwhile_says_nothing_either(world: World) -> None:
    await world.answer(incarnation=TWIN.incarnation)
    world.hub.is_frozen = True  # so that the question is on its way when the server dies
    asyncio.get_running_loop().call_later(0.05, world.hub.down)
    with pytest.raises(BusError):
        await world.is_alive(TWIN)

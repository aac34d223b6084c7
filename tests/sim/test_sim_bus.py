"""The simulation's bus keeps the contract of nats-server and of the bus in memory: the same tests,
in virtual time."""

import random
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from typing import Any

import pytest

from protocol.bus import Bus
from tests.contract import test_bus_contract
from tests.sim.bus import SimBus, SimHub
from tests.sim.loop import Process, SimLoop

Test = Callable[..., Coroutine[Any, Any, None]]


class SimWorld:
    """As `tests.contract.bus_worlds.World`."""

    def __init__(self, loop: SimLoop, seed: int) -> None:
        self._hub = SimHub(loop, random.Random(seed), lambda *_told: None)
        self._loop = loop
        self._numbers = count(1)
        self.max_payload = self._hub.max_payload
        self.kill, self.revive = self._hub.take_down, self._hub.bring_up

    def make(self, *, pending_bytes: int = 64 << 20) -> Bus:
        assert pending_bytes == 64 << 20, "a simulated connection has no other bound"
        return SimBus(self._hub, Process(self._loop, f"p{next(self._numbers)}"))


def cases() -> Iterator[Any]:
    """Every test of the contract with each of its values."""
    for name, test in vars(test_bus_contract).items():
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if not marks:
            yield pytest.param(test, {}, id=name)
        for mark in marks:
            argument, values = mark.args
            for value in values:
                yield pytest.param(test, {argument: value}, id=f"{name}[{value}]")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("test", "values"), list(cases()))
def test_the_contract_holds(test: Test, values: dict[str, Any], seed: int) -> None:
    loop = SimLoop()
    try:
        loop.run_until_complete(test(world=SimWorld(loop, seed), **values))
    finally:
        loop.unwind()
        loop.close()
    assert not loop.failures

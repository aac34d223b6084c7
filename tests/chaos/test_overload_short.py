"""A few seconds of `make overload`."""

import asyncio
from pathlib import Path

import pytest

from tests.chaos.overload import LEAST, SETTINGS, Overload
from tests.chaos.world import ChaosFleet


@pytest.mark.timeout(120)
def test_ten_times_what_the_fleet_can_do(tmp_path: Path) -> None:
    with ChaosFleet(tmp_path, "shm", settings=SETTINGS) as fleet:
        run = Overload(fleet, warm_s=1.0, peak_s=4.0)
        asyncio.run(run.run(8.0))
    assert run.problems == []
    assert run.found["share_of_peak"] >= LEAST
    assert run.found["refused"]["queue_full"] > run.found["served"]

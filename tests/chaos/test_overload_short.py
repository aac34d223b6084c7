"""A few seconds of `make overload`, but for its times: who else runs here is not known."""

import asyncio
from pathlib import Path

import pytest

from tests.chaos.overload import SETTINGS, Overload
from tests.chaos.world import ChaosFleet


@pytest.mark.timeout(120)
def test_ten_times_what_the_fleet_can_do(tmp_path: Path) -> None:
    with ChaosFleet(tmp_path, "shm", settings=SETTINGS) as fleet:
        run = Overload(fleet, warm_s=0.5, peak_s=3.0, is_timed=False)
        asyncio.run(run.run(6.0))
    assert run.problems == []
    assert run.found["refused"]["queue_full"] > run.found["served"]

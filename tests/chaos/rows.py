"""The table: every row of `make chaos`, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from tests.chaos import rows_bus, rows_clients, rows_fleet, rows_rolling
from tests.chaos.clients import start, wave
from tests.chaos.faults import FAULTS
from tests.chaos.points import POINTS, standing
from tests.chaos.trial import Trial
from tests.chaos.world import TRANSPORTS

NEW: Final = 20


@dataclass(frozen=True)
class Row:
    """`run` does it all; `fresh`: on a fleet of its own, which nobody uses afterwards."""

    name: str
    run: Callable[[Trial], None]
    transports: tuple[str, ...] = TRANSPORTS
    fresh: bool = False
    sizes: tuple[int, int] = (2, 2)
    """Workers that prefill and decode."""
    settings: tuple[str, ...] = ()
    """Over those of every row, on a fleet of its own."""


def crossing(trial: Trial, *, fault: str, role: str, point: str) -> None:
    """Eight streams stand at `point`, a worker that has some of them is struck, twenty new ones
    come at once."""
    what = FAULTS[fault]
    with standing(trial, POINTS[role, point]) as victim:
        trial.broke()
        what.strike(trial, victim)
    trial.clients += start(trial.fleet, wave(NEW, salt=trial.salt))
    what.during(trial, victim)
    trial.join()
    trial.look(frozen=what.stays_frozen)
    what.after(trial, victim)


MATRIX: Final = tuple(
    Row(f"{fault}/{role}/{point}", partial(crossing, fault=fault, role=role, point=point))
    for fault in FAULTS
    for role, point in POINTS
)
ROWS: Final = MATRIX + tuple(
    Row(name, run, **more)
    for group in (rows_fleet.ROWS, rows_bus.ROWS, rows_clients.ROWS, rows_rolling.ROWS)
    for name, run, more in group
)

"""Rows in which nothing breaks: all is restarted in an orderly way, one after the other, under
load. No client may see an error, nor a silence longer than the slack."""

import os
import signal
from collections.abc import Callable
from typing import Any, Final

from tests.chaos.clients import start, wave
from tests.chaos.trial import SLACK_S, Trial
from tests.e2e.parents import children, said
from tests.e2e.rolling_load import Load, under_load

EACH: Final = 10
ROLL_S: Final = 60.0


def _judge(trial: Trial, load: Load) -> None:
    answered = ", ".join(f"{count} over {kind}" for kind, count in load.answered.items())
    trial.note(f"answered besides: {answered}; worst gap {load.worst_gap:.2f} s")
    trial.wrong += load.errors[:4]
    if load.worst_gap > SLACK_S:
        trial.wrong.append(f"silent for {load.worst_gap:.1f} s")
    if not all(load.answered.values()):
        trial.wrong.append("the load did not flow")


def workers(trial: Trial) -> None:
    """SIGTERM, then the same name again as a new incarnation, for each of them."""
    fleet = trial.fleet
    with under_load(fleet) as load:
        trial.broke()
        for name in [process.name for process in fleet.workers()]:
            incarnation = fleet.worker(name)["incarnation"]
            trial.clients += start(fleet, wave(EACH, salt=f"{trial.salt} {name}"))
            trial.hit += fleet.worker(name)["reservations"]
            fleet.terminate(name)
            if code := fleet.until_ended(name, timeout_s=ROLL_S):
                trial.wrong.append(f"{name} ended with {code}")
            fleet.restart(name)
            fleet.until_back(name, incarnation)
    trial.join()
    _judge(trial, load)
    trial.look()


def routers(trial: Trial) -> None:
    """Two under one parent, three times."""
    fleet = trial.fleet
    parent = fleet.process("router")
    with under_load(fleet) as load:
        trial.broke()
        for number in range(1, 4):
            before = children(parent)
            trial.clients += start(fleet, wave(EACH, salt=f"{trial.salt} {number}"))
            os.kill(parent.pid, signal.SIGHUP)
            fleet.until(
                lambda number=number: said(parent).count("rolling restart done") == number,
                what="the rolling restart",
                timeout_s=ROLL_S,
            )
            trial.hit += len(before)
            if set(before) & set(children(parent)):
                trial.wrong.append(f"not all are new: {before}, {children(parent)}")
    trial.join()
    _judge(trial, load)
    trial.look()


ROWS: Final[tuple[tuple[str, Callable[[Trial], None], dict[str, Any]], ...]] = (
    ("rolling/workers", workers, {"fresh": True}),
    ("rolling/routers", routers,
     {"settings": ("router.processes=2", "router.idle_grace_ms=1000")}),
)  # fmt: skip

"""What is done to a worker, and what belongs to it afterwards."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.chaos.clients import until
from tests.chaos.trial import QUARANTINE_S, Trial

THAW_S: Final = 8.0


@dataclass(frozen=True)
class Fault:
    """`strike` breaks the worker; `after` is run when every client has its end."""

    name: str
    strike: Callable[[Trial, str], None]
    during: Callable[[Trial, str], None] = lambda trial, victim: None
    """While the clients wait."""
    after: Callable[[Trial, str], None] = lambda trial, victim: None
    stays_frozen: bool = False


def _kill(trial: Trial, victim: str) -> None:
    trial.killed.add(victim)
    trial.fleet.kill(victim)


def _freeze(trial: Trial, victim: str) -> None:
    trial.incarnation = str(trial.fleet.worker(victim).get("incarnation"))
    os.kill(trial.fleet.process(victim).pid, signal.SIGSTOP)


def _thaw(trial: Trial, victim: str) -> None:
    """Late words change nothing, and the worker is one of the fleet again."""
    fleet = trial.fleet
    trial.sleep_until(trial.fault_at + THAW_S)
    os.kill(fleet.process(victim).pid, signal.SIGCONT)
    _until_no_quarantine(trial)
    trial.until(lambda: victim in fleet.eligible(), f"{victim} eligible again", timeout_s=40.0)
    if fleet.worker(victim).get("incarnation") != trial.incarnation:
        trial.wrong.append(f"{victim} came back as another")


def _bury(trial: Trial, victim: str) -> None:
    """It stayed frozen: what it may still write is fenced, and free when it is dead."""
    held = trial.fleet.quarantined()
    if held:
        trial.note(f"{held:.0f} blocks in quarantine while it is stopped")
    trial.killed.add(victim)
    trial.fleet.kill(victim)
    _until_no_quarantine(trial)


def _until_no_quarantine(trial: Trial) -> None:
    began = time.monotonic()
    if not until(lambda: not trial.fleet.quarantined(), timeout_s=QUARANTINE_S, step_s=0.1):
        trial.wrong.append(f"{trial.fleet.quarantined():.0f} blocks still in quarantine")
    elif time.monotonic() - began > 0.5:
        trial.note(f"quarantine empty after {time.monotonic() - began:.1f} s")


def _terminate(trial: Trial, victim: str) -> None:
    trial.killed.add(victim)
    trial.fleet.terminate(victim)


def _until_left(trial: Trial, victim: str) -> None:
    code = trial.fleet.until_ended(victim, timeout_s=20.0)
    if code != 0:
        trial.wrong.append(f"{victim} left with {code}")


def _replace(trial: Trial, victim: str) -> None:
    """Its successor does not wait until anybody has missed it."""
    trial.incarnation = str(trial.fleet.worker(victim).get("incarnation"))
    trial.fleet.kill(victim)
    trial.fleet.restart(victim)


def _until_replaced(trial: Trial, victim: str) -> None:
    """Loading a transport's library takes seconds."""
    fleet = trial.fleet
    trial.until(
        lambda: (
            victim in fleet.eligible()
            and fleet.worker(victim).get("incarnation") != trial.incarnation
        ),
        f"successor of {victim}",
        timeout_s=30.0,
    )


FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault("kill", _kill),
        Fault("freeze8", _freeze, during=_thaw),
        Fault("freeze", _freeze, after=_bury, stays_frozen=True),
        Fault("term", _terminate, after=_until_left),
        Fault("restart", _replace, during=_until_replaced),
    )
}

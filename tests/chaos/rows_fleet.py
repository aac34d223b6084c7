"""Rows that lose the last worker of a role or a router, start a twin, or ask the deadly prompt."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from tests.chaos.clients import Client, start, until, wave
from tests.chaos.points import POINTS, STREAMS, standing
from tests.chaos.trial import Trial
from tests.chaos.world import ChaosFleet
from tests.e2e.fleet import environment, is_alive
from tests.e2e.streams import asks

NEW: Final = 20
AWAY_S: Final = 3.0
CROWD: Final = 60
NO_DECODE: Final = frozenset({"queue_timeout", "decode_wait_timeout", "no_decode_worker"})
KILLER: Final = "worker_killer"
MOST_KILLED: Final = 4


def only_prefill_dies(trial: Trial) -> None:
    """Decode workers prefill for themselves."""
    with standing(trial, POINTS["prefill", "in-prefill"]) as victim:
        trial.broke()
        trial.killed.add(victim)
        trial.fleet.kill(victim)
    trial.clients += start(trial.fleet, wave(NEW, salt=trial.salt))
    trial.join()
    local = trial.fleet.metric("baton_events_total", kind="local_prefill")
    trial.note(f"local prefills {local:.0f}")
    trial.look()


def _decode_dies(trial: Trial) -> str:
    with standing(trial, POINTS["decode", "mid-decode"]) as victim:
        trial.broke()
        trial.killed.add(victim)
        trial.fleet.kill(victim)
    trial.clients += start(trial.fleet, wave(NEW, salt=trial.salt))
    for client in trial.clients:
        client.may_fail = NO_DECODE
    return victim


def only_decode_dies_and_returns(trial: Trial) -> None:
    """Whoever waits goes on when it is back: nobody else could serve them."""
    fleet = trial.fleet
    victim = _decode_dies(trial)
    dead = fleet.worker(victim).get("incarnation", "")
    trial.sleep_until(trial.fault_at + AWAY_S)
    fleet.restart(victim)
    fleet.until_back(victim, dead)
    trial.outage_s = time.monotonic() - trial.fault_at
    trial.join()
    if any(client.has_failed for client in trial.clients):
        trial.wrong.append("a client had an error though it came back before any deadline")
    trial.look()


def sixty_streams(trial: Trial) -> None:
    """A decode worker dies with a full batch: many more than the floor of the retry budget."""
    fleet = trial.fleet
    trial.clients += start(fleet, asks(CROWD, 400, kind=f"{trial.salt} crowd", prompt=48))
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    decoding = POINTS["decode", "mid-decode"].stands
    stand = [decoding(trial.story(client.request_id)) for client in trial.clients]
    trial.hit = stand.count("decode-0")
    trial.broke()
    trial.killed.add("decode-0")
    fleet.kill("decode-0")
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.join()
    trial.look()


def only_decode_dies(trial: Trial) -> None:
    """Everybody is told, in time, with a code; from then on at once."""
    victim = _decode_dies(trial)
    trial.join()
    codes = sorted({str(client.error.get("code", "")) for client in trial.clients})
    trial.note(f"codes {' '.join(codes)}")
    if not all(client.has_failed for client in trial.clients[:STREAMS]):
        trial.wrong.append("a stream ended well without any decode worker")
    trial.look()
    trial.fleet.restart(victim)


def one_router_killed(trial: Trial) -> None:
    """Its own connections break; the other's clients see nothing, and its jobs are stopped."""
    fleet = trial.fleet
    flags = ("--local-prefill-tokens=64", "--stall-timeout-ms=3000")
    second = fleet.add_router("second", *flags)
    trial.before.add("second")
    wanted = asks(STREAMS, 250, kind=f"{trial.salt} routers", prompt=200)
    mine = start(fleet, wanted[: STREAMS // 2])
    theirs = start(fleet, wanted[STREAMS // 2 :], port=second.port)
    trial.clients += mine + theirs
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    new = wave(NEW, salt=trial.salt)
    late = start(fleet, new[: NEW // 2], port=second.port)
    trial.hit = sum(not client.is_done for client in theirs)
    for client in theirs + late:
        client.may_fail = frozenset({"broken"})
    trial.broke()
    trial.killed.add("second")
    fleet.kill("second")
    trial.clients += late + start(fleet, new[NEW // 2 :])
    trial.join()
    broken = sum(bool(client.broken) for client in theirs + late)
    trial.note(f"{broken} connections of the dead router broke")
    if not all(client.broken for client in theirs):
        trial.wrong.append("a stream of the dead router did not break")
    trial.look()
    fleet.stop_extra("second")
    trial.before.discard("second")


def twin(trial: Trial) -> None:
    """A second process under a living worker's name says so and leaves; nobody is harmed."""
    fleet = trial.fleet
    with standing(trial, POINTS["decode", "mid-decode"]) as victim:
        trial.broke()
        command = [flag for flag in fleet.command(victim) if not flag.startswith("--metrics-port")]
        with (fleet.folder / "logs" / "twin.log").open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, *command[1:]], stdout=log, stderr=log, env=environment()
            )
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    try:
        code = started.wait(20.0)
    except subprocess.TimeoutExpired:
        trial.wrong.append("the twin stays")
        started.kill()
        code = started.wait()
    said = (fleet.folder / "logs" / "twin.log").read_text().strip().splitlines()
    trial.note(f"the twin left with {code}: {said[-1] if said else 'silently'}")
    if code == 0:
        trial.wrong.append("the twin left with 0")
    trial.join()
    trial.look()


def deadly_prompt(trial: Trial) -> None:
    """Whoever computes it dies at once: the client is told after three, the others never notice."""
    fleet = trial.fleet
    ask = asks(1, 2_000, kind=f"{trial.salt} deadly", prompt=200)[0]
    trial.clients += start(fleet, asks(STREAMS, 250, kind=f"{trial.salt} others", prompt=200))
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    trial.broke()
    deadly = Client(fleet, ask)
    deadly.may_fail = frozenset({KILLER})
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    died = _die(trial, deadly)
    computing = [name for name, was_computing in died if was_computing]
    trial.note(f"no other decode worker for {trial.outage_s:.1f} s")
    trial.note("died: " + " ".join(name if c else f"({name})" for name, c in died))
    trial.clients.append(deadly)
    trial.join()
    code = deadly.error.get("code")
    trial.hit = len(died)
    if code != KILLER:
        trial.wrong.append(f"the deadly prompt ended with {deadly.error or 'no error'}")
    if not 1 < len(computing) <= MOST_KILLED or len(died) > 2 * MOST_KILLED:
        trial.wrong.append(f"{len(computing)} of {len(died)} processes died computing it")
    trial.look()


def _die(trial: Trial, deadly: Client) -> list[tuple[str, bool]]:
    """Kill whoever has it, and put a successor there, until it is over. Who it was, and whether it
    was computing it: one that only lends its KV, or pulls it, tells nothing against it."""
    fleet = trial.fleet
    died: list[tuple[str, bool]] = []
    seen = 0.0
    looked_at = time.monotonic()

    def over() -> bool:
        nonlocal seen, looked_at
        story = trial.story(deadly.request_id)
        before, looked_at = looked_at, time.monotonic()
        if not _other_decoders(fleet, story):
            trial.outage_s += looked_at - before
        given = [s for s in story if s.what in ("start_prefill", "start_local", "decode")]
        if given and given[-1].at > seen and (given[-1].what == "decode" or _is_accepted(story)):
            seen = given[-1].at
            victim = given[-1].detail
            if is_alive(fleet.process(victim).pid):
                lends = story[-1].what in ("prefilled", "lend") or _pulls(story)
                died.append((victim, not lends))
                os.kill(fleet.process(victim).pid, signal.SIGCONT)
                fleet.kill(victim)
                fleet.restart(victim)
        return not deadly.is_alive()

    if not until(over, timeout_s=40.0):
        trial.wrong.append("the deadly prompt does not end")
    return died


def _other_decoders(fleet: ChaosFleet, story: list[Any]) -> set[str]:
    """Decode workers that are there for the others: the one that the deadly prompt has, perhaps
    for itself, is not, nor is one that died of it and is not back."""
    holders = [s.detail for s in story if s.what in ("start_local", "start_pull", "decode")]
    return {name for name in fleet.eligible() if name.startswith("decode")} - set(holders[-1:])


def _pulls(story: list[Any]) -> bool:
    """The last job it was given is a pull."""
    jobs = [s.what for s in story if s.what in ("start_prefill", "start_local", "start_pull")]
    return jobs[-1] == "start_pull" and story[-1].what != "decode"


def _is_accepted(story: list[Any]) -> bool:
    return story[-1].what in ("accepted", "prefilled", "lend")


ROWS: Final[tuple[tuple[str, Callable[[Trial], None], dict[str, Any]], ...]] = (
    ("only-prefill-dies", only_prefill_dies, {"fresh": True, "sizes": (1, 2)}),
    ("only-decode-dies-and-returns", only_decode_dies_and_returns,
     {"fresh": True, "sizes": (2, 1)}),
    ("only-decode-dies", only_decode_dies, {"fresh": True, "sizes": (2, 1)}),
    ("router/one-of-two-killed", one_router_killed, {}),
    ("twin", twin, {}),
    ("deadly-prompt", deadly_prompt, {"settings": ("router.queue_timeout_ms=30000",)}),
    ("kill/decode/sixty-streams", sixty_streams, {"fresh": True}),
)  # fmt: skip

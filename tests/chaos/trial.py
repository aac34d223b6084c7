"""One row while it runs: its clients, what it broke, what may go wrong, and the verdict.

It knows the promise that every row is measured by; rows know only what they break.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from tests.chaos.clients import Client, until
from tests.chaos.world import (
    LEASE_S,
    LEGS,
    TRANSFER_S,
    ChaosFleet,
    Step,
)
from tests.e2e.fleet import is_alive, is_frozen
from tests.e2e.streams import END_S

SLACK_S: Final = 2.0
REPORT_S: Final = 1.5
"""Sweeps come once a second, reports twice."""
QUARANTINE_S: Final = 5.0


class Void(Exception):
    """The fault did not hit what it was meant to hit: the row says nothing."""


@dataclass
class Trial:
    """What a row gathers. `salt` makes its prompts its own."""

    fleet: ChaosFleet
    salt: str
    clients: list[Client] = field(default_factory=list)
    fault_at: float = 0.0
    incarnation: str = ""
    """Of the worker that is frozen: it shall come back as the same one."""
    hit: int = 0
    """Requests that stood at the row's stop point with the victim when it was broken."""
    outage_s: float = 0.0
    """How long something was away that every stream needs; silence of that length is right."""
    killed: set[str] = field(default_factory=set)
    """Names whose process may be gone."""
    routers: tuple[int, ...] = ()
    """Ports of those that are still there; empty: the fleet's own."""
    wrong: list[str] = field(default_factory=list)
    """What a row itself found wrong."""
    evidence: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    clean_s: float = LEASE_S + REPORT_S
    before: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.before = self.fleet.alive()

    def broke(self) -> None:
        """From now on silence counts."""
        self.fault_at = time.monotonic()

    def until(self, condition: Any, what: str, *, timeout_s: float = 10.0) -> None:
        """Raises Void if it does not come true before anything was broken; later it is a fault."""
        if until(condition, timeout_s=timeout_s):
            return
        if not self.fault_at:
            seen = [[s.what for s in self.story(c.request_id)] for c in self.clients]
            raise Void(f"no {what} within {timeout_s:g} s: {seen}")
        self.wrong.append(f"no {what} within {timeout_s:g} s")

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))

    def join(self) -> None:
        """All clients have an end, or hang for good."""
        end = time.monotonic() + END_S
        for client in self.clients:
            client.join(max(0.0, end - time.monotonic()))

    def note(self, text: str) -> None:
        self.evidence.append(text)

    # --- the verdict ---

    def look(self, *, frozen: bool = False) -> None:
        """One lease time after the last client nothing may be left; with a stopped peer, blocks in
        quarantine may be."""
        fleet = self.fleet

        def clean() -> bool:
            self.left = fleet.leftovers(self.routers, quarantine=not frozen)
            return not self.left

        until(clean, timeout_s=self.clean_s, step_s=0.1)

    def gone(self) -> list[str]:
        return sorted(self.before - self.fleet.alive() - self.killed)

    def numbers(self) -> dict[str, Any]:
        """The row of the table."""
        hung = [f"{c.request_id}: hangs after {len(c.text)}" for c in self.clients if c.is_alive()]
        unexpected = [*hung, *(w for c in self.clients if not c.is_alive() and (w := c.wrong()))]
        failed = sum(client.has_failed for client in self.clients if not client.is_alive())
        self._count_moves()
        gap, bound, late = self._worst_gap()
        problems = [*self.wrong, *unexpected[:4]]
        if late:
            problems.append(f"{late}: silent for {gap:.1f} s, bound {bound:.1f} s")
        problems += [f"left: {text}" for text in self.left]
        problems += [f"{name} is gone and was not killed" for name in self.gone()]
        return {
            "requests": len(self.clients),
            "expected_errors": failed + len(hung) - len(unexpected),
            "unexpected_errors": len(unexpected),
            "hit": self.hit,
            "gap_s": round(gap, 2),
            "bound_s": round(bound, 2),
            "left": self.left,
            "gone": self.gone(),
            "problems": problems,
            "evidence": self.evidence,
        }

    def _worst_gap(self) -> tuple[float, float, str]:
        """The longest silence, what was allowed there, and of whom if it was too long: that of the
        client furthest beyond its bound, if one is."""
        found = []
        for client in self.clients:
            if client.broken and "broken" in client.may_fail:
                continue
            silent = client.gap_after(self.fault_at)
            allowed = SLACK_S + self.outage_s + self._expired(client)
            beyond = max(0.0, silent - allowed)
            found.append((beyond, silent, allowed, client.request_id))
        if not found:
            return 0.0, SLACK_S, ""
        beyond, gap, bound, name = max(found)
        if not beyond:
            return gap, bound, ""
        lines = [f"{s.at - self.fault_at:+.2f} {s.what} {s.detail}" for s in self.story(name)]
        self.note(f"story of {name}: " + "; ".join(lines[-24:]))
        return gap, bound, name

    def _expired(self, client: Client) -> float:
        """Seconds of the legs that expired under it."""
        return sum(leg_s(step) for step in self.story(client.request_id) if step.at > self.fault_at)

    def _count_moves(self) -> None:
        """What second chances were for, and how many."""
        causes = Counter(
            f"{step.what}:{step.detail}"
            for client in self.clients
            for step in self.story(client.request_id)
            if step.what in ("requeue", "rewait") and step.at > self.fault_at
        )
        if causes:
            self.note("moved: " + ", ".join(f"{n} {cause}" for cause, n in sorted(causes.items())))

    def story(self, request_id: str) -> list[Step]:
        for port in self.routers or (self.fleet.port,):
            if found := self.fleet.story(request_id, port):
                return found
        return []


def leg_s(step: Step) -> float:
    """Seconds of the deadline whose expiry this step of a story tells of; 0 if it tells of none."""
    if step.what in ("requeue", "rewait", "end"):
        return LEGS.get(step.detail, 0.0)
    if step.what == "transfer_failed" and "no progress" in step.detail:
        return TRANSFER_S
    return 0.0


def mend(fleet: ChaosFleet) -> None:
    """Everybody lives again, thawed, with nothing to do. Raises AssertionError if not."""
    workers = fleet.workers()
    for process in workers:
        if is_frozen(process.pid):
            fleet.kill(process.name)
    dead = [process.name for process in workers if not is_alive(process.pid)]
    before = {name: fleet.worker(name).get("incarnation", "") for name in dead}
    for name in dead:
        fleet.restart(name)
    for name in dead:
        fleet.until_back(name, before[name], timeout_s=20.0)
    names = {process.name for process in workers}
    fleet.until(lambda: names <= set(fleet.eligible()), what="everybody eligible", timeout_s=20.0)
    fleet.until(lambda: not fleet.leftovers(), what="an idle fleet", timeout_s=10.0)
    fleet.learn_ports()

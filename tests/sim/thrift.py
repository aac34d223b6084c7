"""What second chances may cost: where nothing was wrong nobody needs one, and none is endless.

These oracles find bugs that redundancy hides: a lost release is made good by the lease's end, an
overlooked death by the next deadline. The stream is right, but somebody waited for it.
"""

from collections import Counter
from typing import TYPE_CHECKING, Final

from tests.sim.clients import Client
from tests.sim.faults import FREE_FAULTS

if TYPE_CHECKING:
    from tests.sim.fleet import Fleet
    from tests.sim.processes import SimRouter

CHANCES: Final = frozenset({"retry", "resume", "suspected", "silent", "gone"})
HICCUPS: Final = frozenset({"bus_down", "router_cut_bus"})
"""After these everybody has what it said, and is asked for it."""
FREE_MOVES: Final = frozenset({"refused", "unknown_attempt", "gone", "no_replay"})
"""Not charged, within their own bound."""
MAX_MOVES: Final = 4
PROGRESS_TOKENS: Final = 64
DEATHS: Final = frozenset({"crash", "freeze", "cut_bus"})
GAP_S: Final = 5.0
"""A worker falls silent, which is noticed after 2.5 s, and another one goes on."""


def judge_thrift(fleet: "Fleet") -> list[str]:
    kinds = [trouble.kind for trouble in fleet.troubles if trouble.kind not in FREE_FAULTS]
    problems = [text for client in fleet.clients for text in _moves(client)]
    if not kinds:
        problems += _in_quiet(fleet)
    if kinds and HICCUPS.issuperset(kinds):
        problems += _after_hiccups(fleet)
    if len(kinds) == 1 and DEATHS.issuperset(kinds):
        problems += _after_a_death(fleet)
    return problems


def notes_of(router: "SimRouter") -> Counter[tuple[str, str]]:
    """How often each second chance was taken, and why."""
    found: Counter[tuple[str, str]] = Counter()
    for metric in router.metrics.notes.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                found[sample.labels["kind"], sample.labels["cause"]] += int(sample.value)
    return found


def _moves(client: Client) -> list[str]:
    """No choice moves for ever. Progress would make its account new."""
    if client.spec.sampling.max_tokens >= PROGRESS_TOKENS:
        return []
    causes = []
    for _at, *rest in client.router.dispatch.scheduler.story(client.spec.choice):
        words = " ".join(map(str, rest)).split()
        if words and words[0] in ("requeue", "rewait") and words[1:2]:
            causes.append(words[1])
    charged = [cause for cause in causes if cause not in FREE_MOVES]
    if len(charged) <= MAX_MOVES:
        return []
    return [f"{client.spec.choice}: moved {len(charged)} times: {Counter(charged)}"]


def _in_quiet(fleet: "Fleet") -> list[str]:
    """Nothing was wrong but the registry, or the number of requests. A job that waits in a full
    worker for longer than its leg's deadline is taken elsewhere, which is right."""
    problems = []
    has_burst = any(trouble.kind == "burst" for trouble in fleet.troubles)
    for router in fleet.router_lives:
        chances = {key: n for key, n in notes_of(router).items() if key[0] in CHANCES}
        if chances and not has_burst:
            problems.append(f"{router.router_id}: second chances without a fault: {chances}")
    for worker in fleet.lives:
        expired = worker.engine.stats().leases_ended.get("expired", 0)
        if expired:
            problems.append(f"{worker.incarnation}: {expired} leases expired, not given back")
    return problems


def _after_hiccups(fleet: "Fleet") -> list[str]:
    return [
        f"{router.router_id}: {number} choices moved since nobody answered a replay"
        for router in fleet.router_lives
        for (kind, cause), number in notes_of(router).items()
        if kind in ("retry", "resume") and cause == "no_replay"
    ]


def _after_a_death(fleet: "Fleet") -> list[str]:
    """Somebody else goes on soon, if there is somebody else who has a place."""
    if any(trouble.kind == "burst" for trouble in fleet.troubles):
        return []
    return [
        f"{client.spec.choice}: no token for {client.longest_gap_s:.2f} s"
        for client in fleet.clients
        if client.longest_gap_s > GAP_S and _has_place(fleet, client)
    ]


def _has_place(fleet: "Fleet", client: Client) -> bool:
    """Whether all who wanted one while this client did had one without the worker that is gone."""
    plan = fleet.plan
    num_others = sum(role != "prefill" for role in plan.roles) - 1
    end = client.over_at or client.last_at
    together = [
        other
        for other in fleet.clients
        if other.submitted_at <= end
        and (other.over_at is None or other.over_at >= client.submitted_at)
    ]
    tokens = sum(one.spec.num_prompt_tokens + len(one.answer.ids) for one in together)
    return (
        len(together) <= num_others * plan.max_running
        and tokens <= num_others * plan.num_blocks * fleet.model.block_size
    )

"""Where a request stands when something breaks: bringing eight streams there, and seeing it.

The stop points of a request, by who is broken. With a prefill worker: its job is accepted and not
begun; it computes; it lends while the handle waits at a decode worker; it is read; its blocks are
long back. With a decode worker: a job without a handle is accepted and not begun; it prefills for
itself; a handle waits at it; it pulls; it decodes. Steps are held with `sim_hold` where a leg would
be over before a test could look, pulls last because of `sim_transfer_bytes_per_s`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tests.chaos.clients import start
from tests.chaos.trial import Trial, Void
from tests.chaos.world import Step
from tests.e2e.streams import Ask, asks

LEAD: Final = 2
STREAMS: Final = 8
LOCAL: Final = 48
"""Prompt short enough to be prefilled where it decodes."""
LONG: Final = 200
PULLED: Final = 1_500
"""96 kB: a third of a second at the throttled pace."""


@dataclass(frozen=True)
class Point:
    """One stop point. `lead` streams decode first, so that the held step is not the new ones'."""

    name: str
    role: str
    stands: Callable[[list[Step]], str]
    """The worker of `role` that a story puts here; empty if it is elsewhere."""
    prompt: int = LONG
    max_tokens: int = 60
    hold: str = ""
    lead: int = 0
    at_least: int = STREAMS
    """So many of the streams stand here when the fault comes."""


def start_of(story: list[Step], move: str) -> str:
    """Who was given the last job of that kind; empty if the request stands there no more."""
    moves = [step for step in story if step.what in _MOVES]
    if not moves or moves[-1].what != move:
        return ""
    return moves[-1].detail


def accepted(story: list[Step]) -> bool:
    return bool(story) and story[-1].what == "accepted"


def _prefilling(story: list[Step]) -> str:
    return start_of(story, "start_prefill") if accepted(story) else ""


def _local(story: list[Step]) -> str:
    return start_of(story, "start_local") if accepted(story) else ""


def _waiting_or_pulling(story: list[Step]) -> str:
    return start_of(story, "start_pull") if accepted(story) else ""


def _pulling(story: list[Step]) -> str:
    return start_of(story, "start_pull")


def _source(stands: Callable[[list[Step]], str]) -> Callable[[list[Step]], str]:
    """The lender, where the request stands with a decode worker."""

    def lender(story: list[Step]) -> str:
        lent = [step.detail for step in story if step.what == "start_prefill"]
        return lent[-1] if stands(story) and lent else ""

    return lender


def _decoding(story: list[Step]) -> str:
    return start_of(story, "decode")


_MOVES: Final = frozenset(
    {
        "start_prefill", "start_local", "start_pull", "lend", "decode", "rewait", "requeue", "end",
        "submitted", "prefilled",
    }
)  # fmt: skip

POINTS: Final = {
    (point.role, point.name): point
    for point in (
        Point("accepted", "prefill", _prefilling, hold="prefill", lead=LEAD),
        Point("in-prefill", "prefill", _prefilling, hold="prefill"),
        Point("handle-waiting", "prefill", _source(_waiting_or_pulling), hold="decode", lead=LEAD),
        Point("mid-pull", "prefill", _source(_pulling), prompt=PULLED, at_least=3),
        Point("mid-decode", "prefill", _source(_decoding), max_tokens=250),
        Point("accepted", "decode", _local, prompt=LOCAL, hold="decode", lead=LEAD),
        Point("in-prefill", "decode", _local, prompt=LOCAL, hold="decode"),
        Point("handle-waiting", "decode", _waiting_or_pulling, hold="decode", lead=LEAD),
        Point("mid-pull", "decode", _pulling, prompt=PULLED, at_least=3),
        Point("mid-decode", "decode", _decoding, max_tokens=250),
    )
}


@contextmanager
def standing(trial: Trial, point: Point) -> Iterator[str]:
    """Eight streams, those that matter at `point`; the name of the worker to break. Inside of the
    block they are held there, if the point holds. Raises Void if they cannot be brought there."""
    fleet = trial.fleet
    kind = f"{trial.salt} {point.role} {point.name}"
    lead: list[Ask] = asks(point.lead, 120, kind=f"{kind} lead", prompt=LONG)
    wanted = asks(STREAMS - point.lead, point.max_tokens, kind=f"{kind} held", prompt=point.prompt)
    leaders = []
    if point.hold == "prefill":  # the lead is what the held step is about
        with fleet.held(point.hold):
            leaders = start(fleet, lead)
            trial.clients += leaders
            trial.until(
                lambda: all(_prefilling(trial.story(c.request_id)) for c in leaders), "lead"
            )
            yield _bring(trial, point, wanted)
        return
    leaders = start(fleet, lead)
    trial.clients += leaders
    trial.until(lambda: all(_decoding(trial.story(c.request_id)) for c in leaders), "lead")
    with fleet.held(point.hold):
        yield _bring(trial, point, wanted)


def _bring(trial: Trial, point: Point, wanted: list[Ask]) -> str:
    clients = start(trial.fleet, wanted)
    trial.clients += clients
    found: dict[str, int] = {}
    enough = min(point.at_least, len(wanted))

    def there() -> bool:
        found.clear()
        for client in clients:
            name = point.stands(trial.story(client.request_id))
            if name:
                found[name] = found.get(name, 0) + 1
        return sum(found.values()) >= enough

    trial.until(there, f"{point.name}")
    if not found:
        raise Void(f"nobody at {point.name}: {trial.story(clients[0].request_id)}")
    victim = max(sorted(found), key=lambda name: found[name])
    trial.hit = found[victim]
    return victim

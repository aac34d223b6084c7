"""Rows in which clients leave, or stop reading."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from tests.chaos.clients import DeafNatsClient, Socket, start, wave
from tests.chaos.points import POINTS, Point
from tests.chaos.trial import Trial
from tests.chaos.world import Step
from tests.e2e.streams import asks

NEW: Final = 20
NUM_LEAVING: Final = 8
CROWD: Final = 200
CANCEL_S: Final = 1.0
"""The promise is 100 ms in the router; two looks over HTTP on a busy machine need more."""


def leaves(trial: Trial, *, role: str, point: str) -> None:
    """Eight leave at `point`, one stays; nothing is left of those, and the others see nothing."""
    _leave(trial, POINTS[role, point])


def _leave(trial: Trial, point: Point) -> None:
    fleet = trial.fleet
    lead = start(fleet, asks(2, 120, kind=f"{trial.salt} lead", prompt=200))
    trial.clients += lead
    if point.hold != "prefill":
        trial.until(lambda: all(client.flowing.is_set() for client in lead), "lead")
    cancelled = fleet.metric("baton_choices_total", outcome="cancelled")
    with fleet.held(point.hold):
        sockets = [Socket(fleet.port) for _ in range(NUM_LEAVING)]
        wanted = asks(NUM_LEAVING, 250, kind=trial.salt, prompt=point.prompt)
        for one, ask in zip(sockets, wanted, strict=True):
            one.ask(ask)
        trial.until(lambda: _standing(trial, sockets, point.stands) >= point.at_least, point.name)
        trial.hit = _standing(trial, sockets, point.stands)
        trial.broke()
        for one in sockets:
            one.leave()
        _until_cancelled(trial, cancelled + NUM_LEAVING)
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.join()
    trial.look()


def _standing(trial: Trial, sockets: list[Socket], stands: Callable[[list[Step]], str]) -> int:
    return sum(bool(stands(trial.story(one.request_id))) for one in sockets)


def _until_cancelled(trial: Trial, wanted: float) -> None:
    began = time.monotonic()

    def count() -> float:
        return trial.fleet.metric("baton_choices_total", outcome="cancelled")

    trial.until(lambda: count() >= wanted, f"{wanted:.0f} cancelled (are {count():.0f})")
    took_s = time.monotonic() - began
    if took_s > CANCEL_S:
        trial.wrong.append(f"cancelled only after {took_s:.2f} s")


def leaves_in_the_queue(trial: Trial) -> None:
    """All places are taken: who waits in the router's queue leaves."""
    queued = Point("queue", "", _queued, hold="decode", at_least=1)
    fleet = trial.fleet
    with fleet.held("decode"):
        fill = start(fleet, asks(140, 10, kind=f"{trial.salt} fill", prompt=48))
        trial.clients += fill
        trial.until(lambda: fleet.metric("baton_queued_choices") > 4, "a queue")
        cancelled = fleet.metric("baton_choices_total", outcome="cancelled")
        sockets = [Socket(fleet.port) for _ in range(NUM_LEAVING)]
        for one, ask in zip(sockets, asks(NUM_LEAVING, 10, kind=trial.salt), strict=True):
            one.ask(ask)
        trial.until(lambda: _standing(trial, sockets, queued.stands) >= 1, "queue")
        trial.hit = _standing(trial, sockets, queued.stands)
        trial.broke()
        for one in sockets:
            one.leave()
        _until_cancelled(trial, cancelled + NUM_LEAVING)
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.join()
    trial.look()


def _queued(story: list[Step]) -> str:
    return "router" if story and story[-1].what == "submitted" else ""


def crowd_leaves(trial: Trial) -> None:
    """Two hundred leave at once while their blocks are on the way."""
    fleet = trial.fleet
    trial.clients += start(fleet, asks(8, 250, kind=f"{trial.salt} stay", prompt=200))
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    cancelled = fleet.metric("baton_choices_total", outcome="cancelled")
    sockets = [Socket(fleet.port) for _ in range(CROWD)]
    for one, ask in zip(sockets, asks(CROWD, 30, kind=trial.salt, prompt=1_000), strict=True):
        one.ask(ask)
    pulling = POINTS["decode", "mid-pull"].stands
    trial.until(lambda: _standing(trial, sockets[:40], pulling) > 2, "transfers")
    trial.hit = _standing(trial, sockets, pulling)
    trial.broke()
    for one in sockets:
        one.leave()
    trial.until(lambda: fleet.metric("baton_inflight_choices") <= 8, "the crowd gone")
    took_s = time.monotonic() - trial.fault_at
    trial.note(f"gone after {took_s:.1f} s")
    if took_s > CANCEL_S + 1.0:
        trial.wrong.append(f"gone only after {took_s:.1f} s")
    count = fleet.metric("baton_choices_total", outcome="cancelled") - cancelled
    trial.note(f"{count:.0f} of {CROWD} were under way")
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.join()
    trial.look()


def stops_reading(trial: Trial) -> None:
    """One client takes nothing: it alone is cut, after the stall timeout; blocks come back."""
    fleet = trial.fleet
    deaf = Socket(fleet.port, receive_bytes=4096)
    slow = fleet.metric("baton_slow_clients_total")
    trial.clients += start(fleet, asks(8, 250, kind=f"{trial.salt} stay", prompt=200))
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    trial.broke()
    deaf.ask(asks(1, 6_000, kind=trial.salt, prompt=200)[0], n=40)
    trial.hit = 1
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.until(
        lambda: fleet.metric("baton_slow_clients_total") > slow, "end of the deaf", timeout_s=40.0
    )
    trial.note(f"cut after {time.monotonic() - trial.fault_at:.1f} s")
    trial.join()
    trial.look()
    deaf.leave()


def deaf_nats_client(trial: Trial) -> None:
    """A NATS client that asks for much and reads nothing; the server ends it, and we its work."""
    fleet = trial.fleet
    trial.clients += start(fleet, asks(8, 250, kind=f"{trial.salt} stay", prompt=200))
    trial.until(lambda: all(c.flowing.is_set() for c in trial.clients), "flowing streams")
    trial.broke()
    wanted = asks(4, 4_000, kind=trial.salt, prompt=200)
    deaf = DeafNatsClient(fleet.process("nats").port, wanted, n=10)
    trial.hit = 1
    trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    trial.join()
    trial.until(
        lambda: not fleet.metric("baton_inflight_choices"), "end of the deaf", timeout_s=60.0
    )
    trial.note(f"over after {time.monotonic() - trial.fault_at:.1f} s")
    trial.note(f"cancelled {fleet.metric('baton_choices_total', outcome='cancelled'):.0f}")
    trial.look()
    deaf.leave()


ROWS: Final[tuple[tuple[str, Callable[[Trial], None], dict[str, Any]], ...]] = (
    *(
        (f"client-leaves/{role}/{point}", partial(leaves, role=role, point=point), {})
        for role, point in (
            ("prefill", "accepted"), ("prefill", "in-prefill"), ("decode", "in-prefill"),
            ("decode", "handle-waiting"), ("decode", "mid-pull"), ("decode", "mid-decode"),
        )
    ),
    ("client-leaves/queue", leaves_in_the_queue, {}),
    ("200-clients-leave/mid-pull", crowd_leaves, {}),
    ("client-stops-reading", stops_reading, {}),
    ("deaf-nats-client", deaf_nats_client, {}),
)  # fmt: skip

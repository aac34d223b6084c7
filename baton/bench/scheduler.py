"""`baton bench scheduler`: what one event costs the scheduler, with fleets of several sizes.

The real scheduler and the events of whole requests (submitted, accepted, prefilled, decoding,
ended), with so many requests in flight at once; no bus, no sockets, a clock that is only counted.
The floor is the cheapest thing that Python can do for an event: a call with one argument.
"""

import argparse
import asyncio
import random
import time
from collections import deque
from typing import Final

from baton.bench.report import Row, progress
from protocol.blocks import pack_ids
from protocol.events import LoadReport
from protocol.handoff import KvHandle
from protocol.worker_info import Capacity, KvLayout, Role, WorkerInfo
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler

TITLE = "CPU-µs per event of the scheduler alone; a request has seven events"
COLUMNS = {
    "event_us": "an event",
    "request_us": "a request",
    "submitted_us": "submitted",
    "prefilled_us": "prefilled",
    "ended_us": "ended",
    "floor_us": "floor: a call",
}
_BLOCK: Final = 32
_PROMPT: Final = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", default="2,16,128", metavar="N,N", help="half of each role")
    parser.add_argument("--requests", type=int, default=4_000, help="in a round")
    parser.add_argument("--inflight", type=int, default=64, help="requests at once")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    sizes = [int(text) for text in args.workers.split(",")]
    rows.extend(Row(f"{size} workers, {args.inflight} requests at once") for size in sizes)
    for number in range(args.rounds):
        for size, row in zip(sizes, rows, strict=True):
            if stop.is_set():
                return
            progress(f"round {number + 1} of {args.rounds}: {row.case}")
            row.add(**_Run(size, number).measure(args.requests, args.inflight))
            await asyncio.sleep(0)


class _Run:
    """One scheduler and the workers it believes in."""

    def __init__(self, num_workers: int, seed: int) -> None:
        self._now = 100.0
        self._rng = random.Random(seed)
        self._scheduler = Scheduler(Limits(), self, self._rng)
        self._spent: dict[str, int] = {}
        self._count: dict[str, int] = {}
        for i in range(max(1, num_workers // 2)):
            for role in ("prefill", "decode"):
                self._list(f"{role}-{i}", role)
        self._spent.clear()
        self._count.clear()

    # what the scheduler reads

    def last_heard(self, attempt: int) -> float:
        return self._now

    def num_output(self, choice: str) -> int:
        return 1

    def _list(self, worker: str, role: Role) -> None:
        info = WorkerInfo(
            worker_id=worker,
            incarnation=f"{worker}-1",
            role=role,
            model="m",
            model_digest="d",
            layout=KvLayout(_BLOCK, 1024),
            capacity=Capacity(100_000, 512, 1 << 20),
            engine="simulated",
        )
        self._feed(ev.WorkerListed(info))
        load = LoadReport(0, 0, 100_000, 100_000, 0, 0, 0, 0)
        self._feed(ev.WorkerReported(worker, info.incarnation, load))

    def _feed(self, event: ev.Event) -> list[cmd.Command]:
        began = time.perf_counter_ns()
        commands = self._scheduler.handle(event, self._now)
        self._scheduler.next_deadline()  # as the driver asks after each event
        spent = time.perf_counter_ns() - began
        name = type(event).__name__
        self._spent[name] = self._spent.get(name, 0) + spent
        self._count[name] = self._count.get(name, 0) + 1
        return commands

    def measure(self, num_requests: int, inflight: int) -> dict[str, float]:
        shared = [pack_ids([self._rng.randrange(4096) for _ in range(_PROMPT)]) for _ in range(16)]
        waiting: deque[list[ev.Event]] = deque()
        for number in range(num_requests):
            prompt = shared[number % len(shared)] + pack_ids([number] * _BLOCK)
            submitted = ev.Submitted(f"c{number}/0", "m", prompt, _PROMPT + _BLOCK, 64)
            waiting.append([submitted])
            if len(waiting) >= inflight:
                self._advance(waiting)
        while waiting:
            self._advance(waiting)
        return self._figures(num_requests)

    def _advance(self, waiting: deque[list[ev.Event]]) -> None:
        """The oldest request has its next event; the clock moves by a tenth of a millisecond."""
        self._now += 1e-4
        events = waiting.popleft()
        for command in self._feed(events.pop(0)):
            match command:
                case cmd.StartPrefill():
                    handle = KvHandle(
                        f"h{command.attempt}", command.worker, command.incarnation,
                        _PROMPT + _BLOCK, _BLOCK, b"", 30.0, [],
                    )  # fmt: skip
                    events += [
                        ev.Accepted(command.attempt),
                        ev.Prefilled(command.attempt, handle, ended=False),
                    ]
                case cmd.StartDecode():
                    events += [
                        ev.Accepted(command.attempt),
                        ev.DecodingStarted(command.attempt),
                        ev.Ended(command.attempt),
                    ]
                case _:
                    pass
        if events:
            waiting.append(events)

    def _figures(self, num_requests: int) -> dict[str, float]:
        total, count = sum(self._spent.values()), sum(self._count.values())
        figures = {
            f"{name.lower()}_us": self._spent[name] / self._count[name] / 1e3
            for name in ("Submitted", "Prefilled", "Ended")
        }
        return {
            **figures,
            "event_us": total / count / 1e3,
            "request_us": total / num_requests / 1e3,
            "floor_us": _call_us(),
        }


def _call_us() -> float:
    def nothing(_event: object) -> None:
        pass

    began = time.perf_counter_ns()
    for _ in range(100_000):
        nothing(None)
    return (time.perf_counter_ns() - began) / 1e8

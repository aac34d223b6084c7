"""Simulated workers, a bus that may be down, and the driver's half, in virtual time.

The world runs the scheduler's commands on its workers and asserts what the driver relies on: every
attempt is opened and closed once, a handle is released once, a dead lender is told nothing.
"""

import random
from dataclasses import dataclass, field

from protocol.events import LoadReport
from protocol.handoff import KvHandle
from protocol.worker_info import Capacity, KvLayout, Role, WorkerInfo
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler

ROLES: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode", "both")


@dataclass
class Job:
    choice: str
    kind: str
    state: str = "queued"
    handle: KvHandle | None = None


@dataclass
class Worker:
    name: str
    role: Role
    life: int = 1
    alive: bool = True
    listed: bool = True
    jobs: dict[int, Job] = field(default_factory=dict)
    kv_events: int = 0
    steps: int = 0

    @property
    def incarnation(self) -> str:
        return f"{self.name}-{self.life}"


class World:
    """Workers, a bus that may be down, and what the driver would keep."""

    def __init__(self, seed: int, limits: Limits) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.bus_up = True
        self.loss = 0.0
        self.output: dict[str, int] = {}
        self.heard: dict[int, float] = {}
        self.open: dict[int, tuple[str, str]] = {}
        self.submitted: set[str] = set()
        self.ended: dict[str, str] = {}
        self.held: set[tuple[str, str]] = set()
        self.released: set[tuple[str, str]] = set()
        self.given_up: set[tuple[str, str]] = set()
        self.notes: dict[str, int] = {}
        self.inbox: list[ev.Event] = []
        self.known: dict[str, str] = {}
        """Incarnations by worker before this event, less those that it has removed so far."""
        self.dispatches: dict[str, int] = {}
        self.scheduler = Scheduler(limits, self, random.Random(seed + 1))
        self.workers = [Worker(f"w{n}", role) for n, role in enumerate(ROLES)]

    def last_heard(self, attempt: int) -> float:
        return self.heard.get(attempt, float("-inf"))

    def num_output(self, choice: str) -> int:
        return self.output.get(choice, 0)

    def info(self, worker: Worker) -> WorkerInfo:
        return WorkerInfo(
            worker.name, worker.incarnation, worker.role, "m", "d", KvLayout(16, 1),
            Capacity(120, 4, 4096), "simulated",
        )  # fmt: skip

    # -- the driver's half

    def feed(self, event: ev.Event) -> None:
        self.inbox.append(event)
        while self.inbox:
            event = self.inbox.pop(0)
            self.known = self.incarnations()
            for command in self.scheduler.handle(event, self.now):
                self.run(command)

    def incarnations(self) -> dict[str, str]:
        return {view.info.worker_id: view.info.incarnation for view in self.scheduler.workers()}

    def run(self, command: cmd.Command) -> None:
        match command:
            case cmd.StartPrefill() | cmd.StartDecode():
                assert command.attempt not in self.open
                assert command.choice not in self.ended
                self.open[command.attempt] = (command.worker, command.incarnation)
                self.heard[command.attempt] = self.now
                count = self.dispatches.get(command.choice, 0) + 1
                self.dispatches[command.choice] = count
                self.deliver(command)
            case cmd.CancelAttempt() | cmd.ForgetAttempt() | cmd.AskReplay():
                assert self.open[command.attempt] == (command.worker, command.incarnation)
                if not isinstance(command, cmd.AskReplay):
                    del self.open[command.attempt]
                self.deliver(command)
            case cmd.ReleaseHandle():
                key = (command.incarnation, command.handle_id)
                known = (self.known, self.incarnations())
                assert command.incarnation in [
                    incarnations.get(command.worker) for incarnations in known
                ], "a dead lender is told nothing"
                assert key in self.held
                assert key not in self.released
                self.released.add(key)
            case cmd.EndChoice():
                assert command.choice not in self.ended
                assert command.choice in self.submitted
                assert (command.outcome == "completed") == (command.code == "")
                self.ended[command.choice] = command.outcome
            case cmd.AskKvSnapshot():
                worker = self.at(command.worker, command.incarnation)
                if worker is not None and self.passes():
                    snapshot = ev.KvSnapshotArrived(
                        worker.name, worker.incarnation, worker.kv_events, []
                    )
                    self.inbox.append(snapshot)
            case cmd.RenewHandles():
                assert command.handle_ids
            case cmd.Note():
                self.notes[command.kind] = self.notes.get(command.kind, 0) + 1
                if command.kind == "removed":
                    self.known.pop(command.worker, None)
                    self.give_up(command.worker)

    def give_up(self, name: str) -> None:
        """The scheduler takes this worker for dead: its lease ends what it lent."""
        known = self.incarnations().get(name)
        self.given_up |= {
            key for key in self.held if key[0].startswith(f"{name}-") and key[0] != known
        }

    # -- the bus

    def passes(self) -> bool:
        return self.bus_up and self.rng.random() >= self.loss

    def at(self, name: str, incarnation: str) -> Worker | None:
        for worker in self.workers:
            if worker.name == name and worker.incarnation == incarnation and worker.alive:
                return worker
        return None

    def say(self, event: ev.Event) -> None:
        """From a worker to us."""
        if self.passes():
            self.feed(event)

    def deliver(
        self,
        command: cmd.StartPrefill
        | cmd.StartDecode
        | cmd.CancelAttempt
        | cmd.ForgetAttempt
        | cmd.AskReplay,
    ) -> None:
        worker = self.at(command.worker, command.incarnation)
        if worker is None:
            if self.bus_up:
                self.inbox.append(ev.WorkerUnreachable(command.worker, command.incarnation))
            return
        if not self.passes():
            return
        match command:
            case cmd.StartPrefill():
                worker.jobs[command.attempt] = Job(command.choice, "prefill")
            case cmd.StartDecode():
                kind = "local" if command.handle is None else "pull"
                worker.jobs[command.attempt] = Job(command.choice, kind)
            case cmd.AskReplay():
                self.repeat(worker, command.attempt)
            case _:
                worker.jobs.pop(command.attempt, None)

    def repeat(self, worker: Worker, attempt: int) -> None:
        job = worker.jobs.get(attempt)
        if job is None:
            event: ev.Event = ev.AttemptFailed(attempt, "decode", "unknown_attempt", "")
        else:
            event = self.word(attempt, job)
        if self.passes() and attempt in self.open:
            self.hear(event, worker)
            self.inbox.append(event)

    def word(self, attempt: int, job: Job) -> ev.Event:
        if job.state == "prefilled":
            return ev.Prefilled(attempt, job.handle, ended=False)
        if job.state == "decoding":
            return ev.DecodingStarted(attempt)
        if job.state == "ended":
            return ev.Ended(attempt)
        return ev.Accepted(attempt, job.handle)

    def hear(self, event: ev.Event, worker: Worker) -> None:
        """The driver has it: a handle in it is ours to give back."""
        if isinstance(event, ev.Prefilled | ev.Accepted) and event.handle is not None:
            self.held.add((worker.incarnation, event.handle.handle_id))

    # -- the workers

    def advance(self, worker: Worker) -> None:
        """One job of it gets one step on; the word of it may be lost."""
        if not worker.alive or not worker.jobs:
            return
        attempt = self.rng.choice(sorted(worker.jobs))
        job = worker.jobs[attempt]
        worker.steps += 1
        if job.state == "queued":
            job.state = "accepted"
            if job.kind == "prefill" and attempt % 3 == 0:
                job.handle = self.new_handle(worker, attempt)
        elif job.state == "accepted" and job.kind == "prefill":
            job.state = "prefilled"
            job.handle = self.new_handle(worker, attempt)
        elif job.state == "accepted":
            job.state = "decoding"
        elif job.state == "decoding":
            self.output[job.choice] = self.output.get(job.choice, 0) + 20
            self.heard[attempt] = self.now
            if self.rng.random() < 0.5:
                job.state = "ended"
        event = self.word(attempt, job)
        if self.passes() and attempt in self.open:
            self.hear(event, worker)
            self.feed(event)

    def new_handle(self, worker: Worker, attempt: int) -> KvHandle:
        return KvHandle(f"h{attempt}", worker.name, worker.incarnation, 1, 16, b"", 30.0, [])

    def report(self, worker: Worker) -> None:
        if not worker.alive:
            return
        lent = 3 * sum(job.state == "prefilled" for job in worker.jobs.values())
        load = LoadReport(
            len(worker.jobs), 0, 120, 120 - min(120, lent), lent, 0, worker.steps,
            worker.kv_events,
        )  # fmt: skip
        worker.steps += 1
        self.say(ev.WorkerReported(worker.name, worker.incarnation, load))

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        ticks = 0
        while True:
            due = self.scheduler.next_deadline()
            if due is None or due > until:
                self.now = until
                return
            if due > self.now:
                self.now = due
                ticks = 0
            ticks += 1
            assert ticks < 200, "time stands still"
            self.feed(ev.Ticked())

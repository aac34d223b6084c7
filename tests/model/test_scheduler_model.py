"""The scheduler against a fleet that lies dead, loses messages and comes back, in virtual time.

The world below runs the scheduler's commands on simulated workers. Rules kill and restart workers,
lose messages both ways, take the bus away, cancel clients and let time pass; after each step the
books must agree. In the end the faults stop, the fleet answers honestly, and then every choice has
ended exactly once, every attempt was closed exactly once, and nothing is charged to anybody.
"""

import random
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import event as hyp_event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protocol.blocks import HASH_BYTES, pack_ids
from protocol.events import KvStored, LoadReport
from protocol.handoff import KvHandle
from protocol.out import FailureCode
from protocol.worker_info import Capacity, KvLayout, Role, WorkerInfo
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler

CODES: tuple[FailureCode, ...] = (
    "unknown_attempt", "lease_lost", "transfer_failed", "handle_mismatch", "context_length",
    "invalid_request", "aborted", "engine",
)  # fmt: skip
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
            for command in self.scheduler.handle(self.inbox.pop(0), self.now):
                self.run(command)

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
                assert command.incarnation in [
                    view.info.incarnation for view in self.scheduler.workers()
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
                    self.give_up(command.worker)

    def give_up(self, name: str) -> None:
        """The scheduler takes this worker for dead: its lease ends what it lent."""
        known = [view.info.incarnation for view in self.scheduler.workers()]
        self.given_up |= {
            key for key in self.held if key[0].startswith(f"{name}-") and key[0] not in known
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


class SchedulerModel(RuleBasedStateMachine):
    workers = st.integers(0, len(ROLES) - 1)

    @initialize(seed=st.integers(0, 2**16), tight=st.booleans())
    def start(self, seed: int, tight: bool) -> None:
        limits = Limits(
            max_queue=4 if tight else 100,
            request_timeout_s=40.0 if tight else None,
            retry_floor=2 if tight else 16,
            max_index_blocks=50,
        )
        self.limits = limits
        self.world = World(seed, limits)
        self.next_choice = 0
        for worker in self.world.workers:
            self.world.feed(ev.WorkerListed(self.world.info(worker)))
            self.world.report(worker)

    @rule(tokens=st.sampled_from([3, 60, 300, 1500]), count=st.integers(1, 4))
    def submit(self, tokens: int, count: int) -> None:
        for _ in range(count):
            choice = f"c{self.next_choice}/0"
            self.next_choice += 1
            self.world.submitted.add(choice)
            packed = pack_ids([7] * tokens)
            self.world.feed(ev.Submitted(choice, "m", packed, tokens, 50))

    @rule(number=st.integers(0, 50))
    def client_goes(self, number: int) -> None:
        self.world.feed(ev.ClientGone(f"c{number}/0"))

    @rule(worker=workers, times=st.integers(1, 6))
    def work(self, worker: int, times: int) -> None:
        for _ in range(times):
            self.world.advance(self.world.workers[worker])

    @rule(times=st.integers(1, 4))
    def all_work_and_report(self, times: int) -> None:
        for _ in range(times):
            for worker in self.world.workers:
                self.world.advance(worker)
                self.world.report(worker)
            self.world.pass_time(0.25)

    @rule(tokens=st.sampled_from([60, 300]), times=st.integers(4, 8))
    def all_is_well_for_a_while(self, tokens: int, times: int) -> None:
        self.submit(tokens, 3)
        self.all_work_and_report(times)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.1, 2.6, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(loss=st.sampled_from([0.0, 0.0, 0.2, 0.7]))
    def messages_get_lost(self, loss: float) -> None:
        self.world.loss = loss

    @rule(worker=workers)
    def die(self, worker: int) -> None:
        self.world.workers[worker].alive = False

    @rule(worker=workers, listed_first=st.booleans())
    def restart(self, worker: int, listed_first: bool) -> None:
        one = self.world.workers[worker]
        one.life += 1
        one.alive = one.listed = True
        one.jobs = {}
        one.kv_events = 0
        if not listed_first:
            self.world.report(one)
        self.world.feed(ev.WorkerListed(self.world.info(one)))
        self.world.report(one)

    @rule(worker=workers)
    def come_back(self, worker: int) -> None:
        """It was only frozen."""
        one = self.world.workers[worker]
        one.alive = True
        self.world.report(one)

    @rule(worker=workers)
    def key_vanishes(self, worker: int) -> None:
        one = self.world.workers[worker]
        one.listed = False
        self.world.feed(ev.WorkerUnlisted(one.name, one.incarnation))

    @rule(worker=workers)
    def key_returns(self, worker: int) -> None:
        one = self.world.workers[worker]
        one.listed = True
        self.world.feed(ev.WorkerListed(self.world.info(one)))

    @rule(worker=workers)
    def old_incarnation_speaks(self, worker: int) -> None:
        one = self.world.workers[worker]
        load = LoadReport(0, 0, 1, 1, 0, 0, 0, 0)
        self.world.feed(ev.WorkerReported(one.name, f"{one.name}-{one.life - 1}", load))

    @rule(up=st.booleans())
    def bus(self, up: bool) -> None:
        self.world.bus_up = up
        self.world.feed(ev.BusUp() if up else ev.BusDown())

    @rule(worker=workers)
    def gap(self, worker: int) -> None:
        one = self.world.workers[worker]
        self.world.feed(ev.GapSeen(one.name, one.incarnation))

    @rule(worker=workers, code=st.sampled_from(CODES), refuse=st.booleans())
    def fail(self, worker: int, code: FailureCode, refuse: bool) -> None:
        one = self.world.workers[worker]
        for attempt in list(one.jobs)[:1]:
            del one.jobs[attempt]
            refused = ev.Refused(attempt, "full")
            self.world.say(
                refused if refuse else ev.AttemptFailed(attempt, "transfer", code, "why")
            )

    @rule(worker=workers, first=st.integers(0, 20), lost=st.booleans())
    def kv(self, worker: int, first: int, lost: bool) -> None:
        one = self.world.workers[worker]
        one.kv_events += 1
        stored = KvStored(b"".join(n.to_bytes(HASH_BYTES, "big") for n in range(first, 25)))
        if not lost:
            event = ev.KvChanged(one.name, one.incarnation, one.kv_events, [stored])
            self.world.say(event)

    @rule(attempt=st.integers(1, 60), what=st.integers(0, 3))
    def nonsense(self, attempt: int, what: int) -> None:
        """Events about attempts that the driver does not have any more."""
        if attempt not in self.world.open:
            late: list[ev.Event] = [
                ev.Accepted(attempt), ev.Ended(attempt), ev.DecodingStarted(attempt),
                ev.Prefilled(attempt, None, ended=True),
            ]  # fmt: skip
            self.world.feed(late[what])

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.scheduler.validate()
        assert world.scheduler.num_inflight == len(world.submitted) - len(world.ended)
        assert set(world.open) == set(world.scheduler._t.attempts)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.loss = 0.0
        world.bus_up = True
        world.feed(ev.BusUp())
        for worker in world.workers:
            worker.alive = worker.listed = True
            world.feed(ev.WorkerListed(world.info(worker)))
        for _ in range(400):
            if not world.scheduler.num_inflight:
                break
            for worker in world.workers:
                world.report(worker)
                for _ in range(len(worker.jobs) * 2):
                    world.advance(worker)
            world.pass_time(0.4)
            world.scheduler.validate()
        assert set(world.ended) == world.submitted
        assert world.open == {}
        assert all(view.num_reservations == 0 for view in world.scheduler.workers())
        assert world.held - world.released <= world.given_up
        assert all(count <= 64 for count in world.dispatches.values())
        for kind in world.notes:
            hyp_event(f"note {kind}")
        for outcome in world.ended.values():
            hyp_event(f"outcome {outcome}")


SchedulerModel.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedulerModel = SchedulerModel.TestCase

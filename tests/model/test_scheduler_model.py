"""The scheduler against a fleet that lies dead, loses messages and comes back, in virtual time.

The world runs the scheduler's commands on simulated workers. Rules kill and restart workers,
lose messages both ways, take the bus away, cancel clients and let time pass; after each step the
books must agree. In the end the faults stop, the fleet answers honestly, and then every choice has
ended exactly once, every attempt was closed exactly once, and nothing is charged to anybody.
"""

from hypothesis import HealthCheck, settings
from hypothesis import event as hyp_event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protocol.blocks import HASH_BYTES, pack_ids
from protocol.events import KvStored, LoadReport
from protocol.out import FailureCode
from router.scheduling import events as ev
from router.scheduling.deadlines import SLACK_S
from router.scheduling.limits import Limits
from tests.model.scheduler_world import ROLES, World

CODES: tuple[FailureCode, ...] = (
    "unknown_attempt", "lease_lost", "transfer_failed", "handle_mismatch", "context_length",
    "invalid_request", "aborted", "engine",
)  # fmt: skip


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

    @rule(
        tokens=st.sampled_from([3, 60, 300, 1500]), count=st.integers(1, 4), related=st.booleans()
    )
    def submit(self, tokens: int, count: int, *, related: bool) -> None:
        siblings = f"r{self.next_choice}" if related else ""
        for _ in range(count):
            choice = f"c{self.next_choice}/0"
            self.next_choice += 1
            self.world.submitted.add(choice)
            packed = pack_ids([7] * tokens)
            self.world.feed(ev.Submitted(choice, "m", packed, tokens, 50, siblings=siblings))

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
        self.submit(tokens, 3, related=times % 2 == 0)
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

    @rule(seconds=st.sampled_from([0.7, 4.0, 40.0]), share=st.sampled_from([0.8, 1.0, 2.0]))
    def stand_still(self, seconds: float, share: float) -> None:
        """Our own loop; what it claims may be too much."""
        tables = self.world.scheduler._t
        before, last = tables.bus_now, tables.now
        self.world.now += seconds
        self.world.feed(ev.Paused(seconds * share))
        passed = 0.0 if tables.frozen_at is not None else self.world.now - last - seconds * share
        assert -SLACK_S <= tables.bus_now - before <= max(0.0, passed) + SLACK_S

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
        assert len(world.scheduler._t.siblings) == 0
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

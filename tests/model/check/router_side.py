"""The router process of the world: the real dispatch, inbox and scheduler, without a loop.

Replaced are the mailer, the event loop's timers, metrics, and whoever listens to a stream: that one
compares every token with what the undisturbed model says.
"""

from typing import Any, Final

from protocol.blocks import pack_ids
from protocol.bus import Message
from protocol.errors import ClientError
from protocol.events import LoadReport
from protocol.jobs import Tokens
from protocol.out import Delta
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, KvLayout, WorkerInfo
from router.attempts import Attempts
from router.choices import Choice, ChoiceSpec
from router.dispatch import Dispatch
from router.inbox import Inbox
from router.job_mail import JobMail
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.attempts import FREE_SHARE
from router.scheduling.scheduler import Scheduler
from tests.model.check.copies import constant
from tests.model.check.scopes import Scope
from tests.model.check.wire import Postbox, Violation
from tests.model.check.worker_process import ROUTER, Input, Sent
from tests.model.check.worker_side import BEGINNING, DIGEST, MODEL, expected_output, subjects

FIRST_ATTEMPT: Final = 1_000_001


class SteadyRng:
    """Pauses that jitter would spread stay on the grid of half seconds."""

    def random(self) -> float:
        return 4.5

    def randrange(self, stop: int) -> int:
        return 0


class NoMetrics:
    """Counts nothing."""

    @property
    def pairs(self) -> "NoMetrics":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ignore


def _ignore(*_: object) -> None: ...


class Listener:
    """One client: hears its choice's tokens and its end, each exactly once."""

    def __init__(self, expected: list[int]) -> None:
        self.expected = expected
        self.heard: list[int] = []
        self.outcome = ""
        self.wrong = ""

    def delta(self, choice: Choice, delta: Delta) -> None:
        self.heard += delta.ids
        if self.outcome:
            self.wrong = f"{choice.id} hears a token after its end"
        elif self.heard != self.expected[: len(self.heard)]:
            self.wrong = f"{choice.id} hears {self.heard}, the model says {self.expected}"

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        if self.outcome:
            self.wrong = f"{choice.id} ends twice"
        self.outcome = "completed" if error is None else error.code
        if error is None and self.heard != self.expected:
            self.wrong = f"{choice.id} completes with {self.heard} of {self.expected}"


class Mail(JobMail):
    """The real one, but the turns of a loop are the world's."""

    def __init__(self, names: Subjects) -> None:
        self._subjects = names
        self._router_id = ROUTER
        self._addresses = {}
        self.postbox = Postbox(self._envelope)
        self._mailer = self.postbox  # type: ignore[assignment]
        self.flush_now = self.postbox.flush_now


class Front(Dispatch):
    """The real driver without its loop."""

    def __init__(self, process: "RouterProcess", scope: Scope) -> None:
        self.router_id = ROUTER
        self.scheduler = Scheduler(
            scope.limits, self, constant("rng", SteadyRng), first_attempt=FIRST_ATTEMPT
        )
        self._subjects = subjects()
        self._metrics = constant("metrics", NoMetrics)  # type: ignore[assignment]
        self.stories = constant("metrics", NoMetrics)  # type: ignore[assignment]
        self._clock = process.clock
        self._choices = {}
        self._attempts = Attempts()
        self._pending = process.pending
        self._handling = False
        self._tasks = None
        self._is_reading = self._has_news = False
        self._jobs = Mail(self._subjects)
        self.postbox = self._jobs.postbox
        self.dispatches: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        """The incarnation that failed a choice last, until the choice starts elsewhere."""
        self.wrong = ""
        self.inbox = Inbox(
            self._attempts,
            subjects=self._subjects,
            metrics=self._metrics,
            clock=process.clock,
            feed=self.feed,
            post=self._jobs.post,
            later=process.later,
            is_known=self.scheduler.has_worker,
            tell=_ignore,
        )

    def _arm(self) -> None:
        """The world looks at the deadlines itself."""

    def _handle(self, event: ev.Event) -> None:
        """As in production, but a defect is not survived."""
        now = self._clock()
        if isinstance(event, ev.AttemptFailed) and event.code in ("transfer_failed", "engine"):
            attempt = self._attempts.live.get(event.attempt)
            if attempt is not None and not self._lacked_its_source(attempt.choice.id, event):
                self.failed[attempt.choice.id] = attempt.incarnation
        for command in self.scheduler.handle(event, now):
            self._run(command, now)

    def _note(self, note: cmd.Note) -> None:
        if note.kind == "removed":
            self.inbox.forget_unknown()

    def _start(self, command: cmd.StartPrefill | cmd.StartDecode, now: float) -> None:
        self.dispatches[command.choice] = self.dispatches.get(command.choice, 0) + 1
        failed = self.failed.pop(command.choice, "")
        if failed == command.incarnation and self._could_go_elsewhere(failed):
            self.wrong = f"{command.choice} goes to {failed} again, which has just failed it"
        super()._start(command, now)

    def _lacked_its_source(self, choice: str, event: ev.AttemptFailed) -> bool:
        """Whether a pull failed whose source has gone away, as far as the router knows."""
        lent = self.scheduler._t.choices[choice].lent
        return event.code == "transfer_failed" and lent is not None and lent.is_doubtful

    def _could_go_elsewhere(self, incarnation: str) -> bool:
        """Whether a worker of the same role is eligible and idle."""
        views = self.scheduler.workers()
        roles = [view.info.role for view in views if view.info.incarnation == incarnation]
        return any(
            view.info.role in roles
            and view.info.incarnation != incarnation
            and view.eligible
            and not view.num_reservations
            for view in views
        )

    def forgive(self) -> None:
        """Who is parked was failed by all, and may go to anybody then; or stands aside."""
        t = self.scheduler._t
        for choice in t.admission.parked:
            if not t.choices[choice].tries.excluded:
                self.failed.pop(choice, None)


class RouterProcess:
    """The one router."""

    def __init__(self, scope: Scope) -> None:
        from collections import deque

        self.now = BEGINNING
        self.pending: deque[ev.Event] = deque()
        self.tails: list[Any] = []
        """Looks for a lost tail that are due soon."""
        self.scope = scope
        self.max_dispatches = most_dispatches(scope)
        self.front = Front(self, scope)
        self.listeners: list[Listener | None] = [None] * len(scope.prompts)

    def clock(self) -> float:
        return self.now

    def later(self, delay_s: float, call: Any) -> None:
        self.tails.append(call)

    # -- what it can do

    def apply(self, told: Input) -> Sent:
        getattr(self, f"on_{told[0]}")(*told[1:])
        self.front.forgive()
        return self.front.postbox.empty()

    def on_listed(self, index: int, life: int) -> None:
        self.front.feed(ev.WorkerListed(worker_info(self.scope, index, life)))

    def on_unlisted(self, index: int, life: int) -> None:
        front = self.front
        info = worker_info(self.scope, index, life)
        worker, incarnation = info.worker_id, info.incarnation
        front.feed(ev.WorkerUnlisted(worker, incarnation))
        if not front.scheduler.has_worker(worker, incarnation):
            front.inbox.forget_worker(worker, incarnation)

    def on_submit(self, index: int) -> None:
        spec, listener = _client(self.scope, index)
        self.listeners[index] = listener
        self.front.submit(spec, listener)

    def on_cancel(self, index: int) -> None:
        self.front.cancel(f"choice/{index}")

    def on_out(self, worker: str, payload: bytes) -> None:
        self.front.inbox.on_out(Message(subjects().out(ROUTER, worker), payload))

    def on_gone(self, worker: str, incarnation: str) -> None:
        subject = subjects().gone(ROUTER, worker, incarnation)
        self.front.inbox.on_out(Message(subject, b"", no_responders=True))

    def on_reports(self, reports: tuple[tuple[str, str, int, int], ...]) -> None:
        """Those that can speak report: name, incarnation, blocks, number of the last envelope."""
        for worker, incarnation, num_blocks, last_seq in reports:
            report = LoadReport(0, 0, num_blocks, num_blocks, 0, 0, 0, 0)
            self.front.feed(ev.WorkerReported(worker, incarnation, report))
            self.front.inbox.reported(worker, incarnation, last_seq)

    def on_tail(self) -> None:
        self.tails.pop(0)()

    def on_tick(self, due: float, reports: tuple[tuple[str, str, int, int], ...]) -> None:
        """Time passes until `due` seconds from now: all who can speak have reported by then."""
        self.now += due
        self.on_reports(reports)
        self.front.feed(ev.Ticked())

    # -- what can happen to it

    def timers(self) -> tuple[tuple[float, str], ...]:
        """Seconds until each deadline; and whose silence it is, or empty."""
        tables = self.front.scheduler._t
        return tuple(
            sorted(
                (
                    max(0.0, round(timer.due - self.now, 6)),
                    timer.owner.incarnation if timer.kind == "silence" else "",
                )
                for deadlines in (tables.deadlines, tables.bus_deadlines)
                for when, _, timer in deadlines._heap
                if timer.due is not None and timer.entry == when
            )
        )

    def seen(self) -> dict[str, int]:
        """The last envelope of each incarnation."""
        sources = self.front.inbox._sources
        return {incarnation: source.seen for (_, incarnation), source in sources.items()}

    def is_empty(self) -> bool:
        """All choices have ended and nothing is charged to anybody."""
        front = self.front
        return not (
            front._choices or front._attempts.live or front.scheduler.num_inflight
            or any(view.num_reservations or view.blocks for view in front.scheduler.workers())
        )  # fmt: skip

    # -- what must hold

    def check(self) -> None:
        front = self.front
        front.scheduler.validate()
        if set(front._attempts.live) != set(front.scheduler._t.attempts):
            raise Violation("driver and scheduler do not agree on what is open")
        if front.wrong:
            raise Violation(front.wrong)
        for listener in self.listeners:
            if listener is not None and listener.wrong:
                raise Violation(listener.wrong)
        for choice, number in front.dispatches.items():
            if number > self.max_dispatches:
                raise Violation(f"{choice} was dispatched {number} times")


def most_dispatches(scope: Scope) -> int:
    """Two legs for each try; some are free where the bus or a process may be at fault."""
    faults = scope.crashes + scope.losses + scope.repeats + scope.swaps + scope.pauses
    free = FREE_SHARE * scope.limits.max_attempts if faults else 0
    return 2 * (scope.limits.max_attempts + free)


def worker_info(scope: Scope, index: int, life: int) -> WorkerInfo:
    name = scope.names[index]
    is_prefill = index < scope.prefill
    blocks = scope.prefill_blocks if is_prefill else scope.decode_blocks

    def make() -> WorkerInfo:
        return WorkerInfo(
            name, f"{name}-{life}", "prefill" if is_prefill else "decode", MODEL, DIGEST,
            KvLayout(scope.block_size, 16), Capacity(blocks, scope.max_running, 1 << 10),
            "simulated",
        )  # fmt: skip

    return constant(("info", scope, index, life), make)


def _client(scope: Scope, index: int) -> tuple[ChoiceSpec, Listener]:
    prompt = scope.prompts[index]
    spec = ChoiceSpec(
        f"choice/{index}", index, MODEL, Tokens(pack_ids(prompt)), len(prompt),
        Sampling(scope.max_tokens, temperature=0.0), DIGEST,
    )  # fmt: skip
    return (
        constant(("spec", scope, index), lambda: spec),
        Listener(expected_output(prompt, scope.max_tokens)),
    )

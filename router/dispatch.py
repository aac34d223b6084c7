"""The driver: feeds the scheduler, runs its commands, and moves deltas to their streams.

Everything happens in callbacks on the loop. A token's whole way is `on_out` -> the inbox -> the
choice's sink -> the socket: no task wakes, nothing is parsed twice. The scheduler hears of legs,
never of tokens. Nothing here decides; what is late finds no attempt and changes nothing.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from protocol.blocks import pack_ids
from protocol.bus import Bus, BusEvent, Message
from protocol.codec import decode_snapshot, encode
from protocol.errors import BadMessage, BusError, LocalError
from protocol.jobs import (
    Cancel,
    Decode,
    Done,
    GetKvSnapshot,
    Job,
    JobEnvelope,
    Prefill,
    Release,
    Renew,
    Tokens,
)
from protocol.subjects import Subjects
from router.attempts import Attempt, Attempts
from router.beats import Beats
from router.choices import Choice, ChoiceSink, ChoiceSpec
from router.inbox import Inbox
from router.job_mail import JobMail
from router.metrics import RouterMetrics
from router.outcomes import client_error
from router.pauses import Pauses
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler
from router.stories import Stories

_log = logging.getLogger("baton.router")

LOSSES: Final = frozenset({"silent", "suspected", "gone"})
"""Notes that an operator wants to see at the level of warnings."""
LOST_S: Final = 0.1
"""Losses on our side of the bus are asked for together."""
_TICK_S: Final = 0.001
"""Loops count milliseconds: an earlier call would find nothing due."""


class Dispatch:
    """One per router process."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        router_id: str,
        limits: Limits,
        metrics: RouterMetrics,
        rng: random.Random,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.router_id = router_id
        self.scheduler = Scheduler(limits, self, rng)
        past = self.scheduler.past
        self.stories = Stories(clock, wall_clock, past, metrics.error_answer)
        self._bus = bus
        self._subjects = subjects
        self._metrics = metrics
        self._clock = clock
        self._choices: dict[str, Choice] = {}
        self._attempts = Attempts()
        self._pending: deque[ev.Event] = deque()
        self._handling = False
        self._is_reading = False
        self._has_news = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._lost_timer: asyncio.TimerHandle | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self.pauses = Pauses(clock, self._handle)
        self.beats = Beats(bus, subjects, router_id)
        self._jobs = JobMail(bus, subjects, router_id, metrics.bus_lost)
        self.inbox = Inbox(
            self._attempts,
            subjects=subjects,
            metrics=metrics,
            clock=clock,
            feed=self.feed,
            post=self._jobs.post,
            later=asyncio.get_running_loop().call_later,
            is_known=self.scheduler.has_worker,
            tell=self.stories.noted,
        )

    # --- life ---

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listen for workers' answers; background work lives in `tasks`."""
        self._tasks = tasks
        self._bus.on_event(self._on_bus_event)
        if not self._bus.connected:
            self.feed(ev.BusDown())
        await self._bus.subscribe(self._subjects.out_all(self.router_id), self.on_out)
        tasks.create_task(self.beats.run(), name="beats")

    def leave(self) -> None:
        """Tell the workers that this router is gone, so that they stop its jobs at once."""
        self._tasks = None
        self.pauses.stop()
        for timer in (self._timer, self._lost_timer):
            if timer is not None:
                timer.cancel()
        self._jobs.flush_now()
        self.beats.leave()

    # --- what the front asks ---

    def submit(self, spec: ChoiceSpec, sink: ChoiceSink) -> None:
        """Schedule one choice; `sink` hears everything from now on, also at once."""
        if spec.choice in self._choices:
            raise LocalError(f"choice {spec.choice} is running")
        now = self._clock()
        choice = Choice(spec, sink, arrived_at=now, prompt_tokens=spec.num_prompt_tokens)
        self._choices[spec.choice] = choice
        self.stories.submitted(spec.choice, spec.model)
        self._metrics.started(spec.model)
        prompt = spec.prompt
        self.feed(
            ev.Submitted(
                choice=spec.choice,
                model=spec.model,
                packed_prompt=prompt.packed if isinstance(prompt, Tokens) else b"",
                num_prompt_tokens=spec.num_prompt_tokens,
                max_tokens=spec.sampling.max_tokens,
                cache_salt=spec.cache_salt,
                model_digest=spec.model_digest,
                siblings=spec.siblings,
            )
        )

    def cancel(self, choice: str) -> None:
        """The client went; unknown choices are ignored."""
        if choice in self._choices:
            self.feed(ev.ClientGone(choice))

    @property
    def num_inflight(self) -> int:
        return len(self._choices)

    @property
    def num_attempts(self) -> int:
        """Dispatches whose outcome has not arrived."""
        return len(self._attempts.live)

    @property
    def num_malformed(self) -> int:
        """Messages that the bus has dropped because they are none."""
        return self._bus.num_malformed

    def watch_client(self, token: str, on_gone: Callable[[], None]) -> str:
        """A reply subject on which the bus says that a NATS client stopped listening."""
        self.inbox.watch_client(token, on_gone)
        return self._subjects.client(self.router_id, token)

    # --- the scheduler's reads ---

    def last_heard(self, attempt: int) -> float:
        entry = self._attempts.live.get(attempt)
        return entry.heard_at if entry is not None else float("-inf")

    def num_output(self, choice: str) -> int:
        entry = self._choices.get(choice)
        return len(entry.output) if entry is not None else 0

    # --- events in, commands out ---

    def feed(self, event: ev.Event) -> None:
        """Give the scheduler one event and run what it commands. Re-entrant calls queue up."""
        self._pending.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._pending:
                self._handle(self._pending.popleft())
        finally:
            self._handling = False
        if self._is_reading:
            self._has_news = True
        else:
            self._arm()

    def on_out(self, message: Message) -> None:
        """What a worker says, often of many choices: the timer is looked at when all is taken, and
        not at all where it was tokens alone."""
        self._is_reading = True
        try:
            self.inbox.on_out(message)
        finally:
            self._is_reading = False
            if self._has_news:
                self._has_news = False
                self._arm()

    def _handle(self, event: ev.Event) -> None:
        """A defect met by one event or command is logged, and the others get their turn."""
        now = self._clock()
        if now > self.pauses.late_at:
            self.pauses.over(now)
            now = self._clock()
        try:
            commands = self.scheduler.handle(event, now)
        except Exception:  # noqa: BLE001
            _log.exception("event failed event=%s", type(event).__name__)
            if isinstance(event, ev.Submitted) and event.choice in self._choices:
                self._end(cmd.EndChoice(event.choice, "failed", "queue", "internal_error"), now)
            return
        for command in commands:
            try:
                self._run(command, now)
            except Exception:  # noqa: BLE001
                _log.exception("command failed command=%s", type(command).__name__)

    def _arm(self) -> None:
        deadline = self.scheduler.next_deadline()
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        # Remembered, not asked for: a handle of uvloop's that is due at once knows no time.
        self._timer_at = max(deadline, loop.time() + _TICK_S)
        self._timer = loop.call_at(self._timer_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(ev.Ticked())

    def _run(self, command: cmd.Command, now: float) -> None:
        match command:
            case cmd.StartPrefill() | cmd.StartDecode():
                self._start(command, now)
            case cmd.EndChoice():
                self._end(command, now)
            case cmd.Note():
                self._note(command)
            case cmd.AskKvSnapshot():
                self._spawn_snapshot(command.worker, command.incarnation)
            case cmd.RenewHandles() | cmd.ReleaseHandle():
                job: Job = (
                    Renew(list(command.handle_ids))
                    if isinstance(command, cmd.RenewHandles)
                    else Release([command.handle_id])
                )
                self._jobs.post(command.worker, command.incarnation, job, lazy=True)
            case _:
                self._about_attempt(command)

    def _about_attempt(
        self, command: cmd.ForgetAttempt | cmd.CancelAttempt | cmd.AskReplay
    ) -> None:
        attempt = command.attempt
        match command:
            case cmd.ForgetAttempt():
                self._attempts.drop(attempt, done=True)
                self._jobs.post(command.worker, command.incarnation, Done([attempt]), lazy=True)
            case cmd.CancelAttempt():
                self._attempts.drop(attempt)
                self._jobs.post(command.worker, command.incarnation, Cancel(attempt))
            case cmd.AskReplay():
                entry = self._attempts.live.get(attempt)
                if entry is not None:
                    self.inbox.ask_replay(attempt, entry, self._clock(), command.cause)

    def _start(self, command: cmd.StartPrefill | cmd.StartDecode, now: float) -> None:
        choice = self._choices[command.choice]
        leg = "prefill" if isinstance(command, cmd.StartPrefill) else "decode"
        attempt = Attempt(choice, command.worker, command.incarnation, leg, now, now)
        self._attempts.add(command.attempt, attempt)
        spec = choice.spec
        output = pack_ids(choice.output)
        job: Job
        if isinstance(command, cmd.StartPrefill):
            job = Prefill(
                command.attempt,
                spec.choice,
                spec.prompt,
                choice.sampling,
                output,
                choice.chars,
                spec.cache_salt,
            )
        else:
            job = Decode(
                command.attempt,
                spec.choice,
                spec.prompt,
                choice.sampling,
                command.handle,
                output,
                choice.chars,
                spec.cache_salt,
            )
        if not choice.dispatched_at:
            choice.dispatched_at = now
            self._metrics.queue_time(spec.model, now - choice.arrived_at)
        if isinstance(command, cmd.StartPrefill) or command.handle is None:
            choice.lent_at = 0.0
        self._jobs.post(command.worker, command.incarnation, job)

    def _end(self, command: cmd.EndChoice, now: float) -> None:
        choice = self._choices.pop(command.choice)
        for attempt in list(choice.attempts):
            self._attempts.drop(attempt)
        completed = command.outcome == "completed"
        self._metrics.ended(
            choice.spec.model, command.outcome, command.leg, command.code, now - choice.arrived_at
        )
        if not completed:
            _log.info(
                "choice ended choice=%s outcome=%s leg=%s code=%s",
                command.choice,
                command.outcome,
                command.leg,
                command.code,
            )
        param = choice.spec.grammar_param or None
        error = None if completed else client_error(command, param)
        self.stories.choice_ended(command, error, choice.num_shown)
        choice.sink.ended(choice, error)

    def _note(self, note: cmd.Note) -> None:
        self._metrics.note(note.kind, note.cause)
        if note.choice and note.kind != "replay":  # those are told where they are asked for
            self.stories.noted(note.choice, note.kind, note.cause, note.worker)
        if note.kind == "removed":
            self.inbox.forget_unknown()
        if note.kind not in ("late", "paused"):
            level = logging.WARNING if note.kind in LOSSES else logging.INFO
            about = "".join(
                f" {name}={value}"
                for name, value in (("worker", note.worker), ("choice", note.choice))
                if value
            )
            _log.log(level, "%s cause=%s%s", note.kind, note.cause, about)

    # --- the bus ---

    def _on_bus_event(self, event: BusEvent) -> None:
        match event.kind:
            case "up":
                self.feed(ev.BusUp())
            case "down":
                self.feed(ev.BusDown())
            case "lost":
                self._metrics.bus_lost(event.count)
                ours = event.subject == self._subjects.out_all(self.router_id)
                if ours and self._lost_timer is None:
                    loop = asyncio.get_running_loop()
                    self._lost_timer = loop.call_later(LOST_S, self._ask_all)

    def _ask_all(self) -> None:
        """We were too slow to take what was said, whoever said it."""
        self._lost_timer = None
        for worker, incarnation in self.inbox.sources():
            self.feed(ev.GapSeen(worker, incarnation))

    def _spawn_snapshot(self, worker: str, incarnation: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(self._snapshot(worker, incarnation), name="kv snapshot")

    async def _snapshot(self, worker: str, incarnation: str) -> None:
        ask = encode(JobEnvelope(self.router_id, [GetKvSnapshot()]))
        try:
            subject = self._subjects.jobs(worker, incarnation)
            reply = await self._bus.request(subject, ask, timeout_s=5.0)
            snapshot = decode_snapshot(reply.payload)
            if (snapshot.worker, snapshot.incarnation) != (worker, incarnation):
                raise BadMessage("another worker's snapshot")
        except (BusError, BadMessage) as error:
            _log.info("no KV snapshot worker=%s: %s", worker, error)
            return
        size = 16
        hashes = [
            snapshot.hashes[i : i + size] for i in range(0, len(snapshot.hashes) - size + 1, size)
        ]
        self.feed(ev.KvSnapshotArrived(worker, incarnation, snapshot.last_id, hashes))

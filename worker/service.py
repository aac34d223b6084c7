"""Between the mailbox and the engine: jobs in, outcomes out, nothing decided about KV.

Jobs are idempotent: one that is already here makes the service say its state again. A router that
falls silent while our own bus is up loses its jobs, so that nobody works for no one.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

from protocol.blocks import unpack_ids
from protocol.bus import Bus, BusEvent, Message
from protocol.codec import decode_beat, decode_jobs, encode
from protocol.errors import BadMessage, BusError
from protocol.events import KvEvent
from protocol.handoff import KvHandle
from protocol.ids import JobKey, is_name
from protocol.jobs import (
    Body,
    Cancel,
    Decode,
    Done,
    GetAssets,
    GetKvSnapshot,
    Job,
    Ping,
    Pong,
    Prefill,
    Release,
    Renew,
    Replay,
)
from protocol.mailbox import Mailer
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    FailureCode,
    Leg,
    Out,
    OutEnvelope,
    Prefilled,
    Progress,
    Refused,
)
from protocol.subjects import Subjects
from protocol.worker_info import Role, WorkerInfo
from text.assets import encode as encode_assets
from worker.accepting import LateAccepts
from worker.engine.base import (
    DecodeJob,
    DecodingInfo,
    Engine,
    EngineError,
    EngineInfo,
    PrefillJob,
    PrefillResult,
)
from worker.outbox import Outbox
from worker.routers import Routers
from worker.telemetry import Telemetry

_log = logging.getLogger("baton.worker")

SWEEP_S: Final = 1.0
MAX_OPEN: Final = 4096
"""Attempts here that have not ended; more are refused."""
GRUMBLE_S: Final = 60.0
EXIT_UNHEALTHY: Final = 70


class Service:
    """One per worker process; the engine's `Outlet`."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        engine: Engine,
        worker: str,
        incarnation: str,
        linger_s: float,
        router_timeout_s: float,
        clock: Callable[[], float],
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._engine = engine
        self._worker = worker
        self._incarnation = incarnation
        self._clock = clock
        self._end_process = end_process
        self._role: Role = "both"
        self._routers = Routers(timeout_s=router_timeout_s)
        self._assets = b""
        self._assets_digest = ""
        self._refusing = ""
        self.num_bad = 0
        """Messages that were ignored because they are none."""
        self._bad_logged_at = float("-inf")
        self.outbox = Outbox(self._post, linger_s=linger_s)
        self._accepts = LateAccepts(self.outbox.accept)
        self._mailer: Mailer[Out] = Mailer(
            bus, envelope=self._envelope, on_overflow=self._on_overflow
        )
        self.telemetry = Telemetry(
            bus=bus,
            subject=subjects.events(worker),
            worker=worker,
            incarnation=incarnation,
            load=engine.load,
            last_seq=lambda: self._routers.last_seqs,
        )

    # --- life ---

    async def start(self, info: WorkerInfo, engine_info: EngineInfo) -> None:
        """Listen for jobs. `info` says the role."""
        if engine_info.assets is not None:
            self._assets = encode_assets(engine_info.assets)
            self._assets_digest = engine_info.assets.digest
        self._role = info.role
        self._bus.on_event(self._on_bus_event)
        await self._bus.subscribe(
            self._subjects.jobs(self._worker, self._incarnation), self._on_jobs
        )
        await self._bus.subscribe(self._subjects.routers, self._on_beat)

    async def run(self) -> None:
        """Reports, and the sweep that ends what nobody waits for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.telemetry.run(), name="reports")
            tasks.create_task(self._sweep(), name="sweep")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Forget what nobody asked for in time, and stop the jobs of silent routers."""
        now = self._clock()
        self.outbox.sweep(now)
        for router in self._routers.tick(now, listening=self._bus.connected):
            self._drop_router(router, "silent")

    def refuse(self, reason: str) -> None:
        """Take no new work from now on."""
        self._refusing = reason
        self.telemetry.leaving()

    def close(self) -> None:
        """What still runs is aborted and said to be, so that its routers move it at once."""
        if not self._refusing:
            self.refuse("leaving")
        for key in self.outbox.open_keys():
            self._engine.cancel(key)
            self._fail(key, "aborted", "the worker is leaving")
        self.telemetry.close()
        self._accepts.close()
        self._mailer.flush_now()

    # --- jobs in ---

    def _on_jobs(self, message: Message) -> None:
        try:
            envelope = decode_jobs(message.payload)
            if not is_name(envelope.router):
                raise BadMessage("the router has no name")
        except BadMessage as error:
            self._bad_message(message.subject, error)
            return
        self._hear(envelope.router)
        for job in envelope.jobs:
            try:
                self._on_job(envelope.router, job, message)
            except Exception:  # noqa: BLE001  one bad job must not take the others with it
                _log.exception("job failed router=%s job=%s", envelope.router, type(job).__name__)

    def _on_job(self, router: str, job: Job, message: Message) -> None:
        match job:
            case Prefill() | Decode():
                self._start_job(JobKey(router, job.attempt), job, message.subject)
            case Cancel():
                self._cancel(JobKey(router, job.attempt))
            case Renew():
                self._engine.renew(job.handle_ids)
            case Release():
                self._engine.release(job.handle_ids)
            case Replay():
                self.outbox.replay(JobKey(router, job.attempt), job.index)
            case Done():
                for attempt in job.attempts:
                    self._on_done(JobKey(router, attempt))
            case _:
                self._answer(job, message.reply)

    def _start_job(self, key: JobKey, job: Prefill | Decode, subject: str) -> None:
        if key in self.outbox:
            self.outbox.replay(key, 0)
            return
        reason = self._why_refused(job)
        if reason:
            self._post(key.router, Refused(key.attempt, reason))
            return
        self.outbox.open(key, "prefill" if isinstance(job, Prefill) else "decode")
        try:
            engine_job = _engine_job(key, job)
        except ValueError as error:
            self._bad_message(subject, error)
            self._fail(key, "invalid_request", str(error))
            return
        self._engine.submit(engine_job)
        self._accepts.add(key)
        self.telemetry.changed()

    def _why_refused(self, job: Prefill | Decode) -> str:
        if self._refusing:
            return self._refusing
        if self._role == ("prefill" if isinstance(job, Decode) else "decode"):
            return "wrong_role"
        return "full" if self.outbox.num_open >= MAX_OPEN else ""

    def _fail(self, key: JobKey, code: FailureCode, text: str) -> None:
        leg = self.outbox.leg_of(key)
        self.outbox.failed(key, Failed(key.attempt, leg, code, text), self._clock())

    def _on_done(self, key: JobKey) -> None:
        if self.outbox.is_open(key):  # its router wants nothing more of what still runs
            self._cancel(key)
        else:
            self.outbox.forget(key)

    def _cancel(self, key: JobKey) -> None:
        self._engine.cancel(key)
        self.outbox.forget(key)
        self.telemetry.changed()

    def _answer(self, job: Job, reply: str) -> None:
        if not reply:
            return
        match job:
            case Ping():
                payload = encode(Pong(self._worker, self._incarnation))
            case GetAssets():
                payload = self._assets if job.digest == self._assets_digest else b""
            case GetKvSnapshot():
                payload = encode(self.telemetry.snapshot(self._engine.kv_snapshot()))
            case _:
                return
        try:
            self._bus.publish(reply, payload)
        except BusError as error:
            _log.info("could not answer: %s", error)

    # --- routers ---

    def _on_beat(self, message: Message) -> None:
        try:
            beat = decode_beat(message.payload)
        except BadMessage as error:
            self._bad_message(message.subject, error)
            return
        if beat.leaving:
            self._drop_router(beat.router, "left")
            return
        if beat.router in self._routers:
            self._hear(beat.router)
        if beat.joining:
            self.telemetry.asked()

    def _hear(self, router: str) -> None:
        pushed_out = self._routers.hear(router)
        if pushed_out:
            self._drop_router(pushed_out, "one too many")

    def _drop_router(self, router: str, why: str) -> None:
        keys = self.outbox.keys_of(router)
        if keys:
            _log.info("router %s: %s, stopping jobs=%d", why, router, len(keys))
        for key in keys:
            self._cancel(key)
        self._routers.forget(router)

    def _on_bus_event(self, event: BusEvent) -> None:
        if event.kind == "up":
            self._routers.excuse_all()
            self.telemetry.report()

    # --- what the engine says (Outlet) ---

    def accepted(self, key: JobKey, handle: KvHandle | None) -> None:
        if handle is not None:
            self.outbox.accept(key, Accepted(key.attempt, handle))

    def progress(self, key: JobKey, leg: Leg, done: int, total: int) -> None:
        self.outbox.progress(key, Progress(key.attempt, leg, done, total), self._clock())

    def prefilled(self, key: JobKey, result: PrefillResult) -> None:
        message = Prefilled(
            key.attempt,
            result.prompt_tokens,
            result.cached_tokens,
            result.first,
            result.handle,
            result.queue_s,
            result.prefill_s,
            result.prompt_logprobs,
        )
        if not self.outbox.prefilled(key, message, self._clock()) and result.handle is not None:
            self._engine.release([result.handle.handle_id])
        self.telemetry.changed()

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        self.outbox.decoding(
            key,
            Decoding(
                key.attempt,
                info.cached_tokens,
                info.transport,
                info.transfer_bytes,
                info.transfer_s,
                info.prompt_logprobs,
                info.source,
                info.transport_reason,
            ),
        )

    def step(self, deltas: Sequence[tuple[JobKey, Delta]]) -> None:
        self.outbox.step(deltas, self._clock())
        self.telemetry.changed()

    def failed(self, key: JobKey, error: EngineError) -> None:
        message = Failed(key.attempt, error.leg, error.code, error.message)
        self.outbox.failed(key, message, self._clock())
        self.telemetry.changed()

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None:
        self.telemetry.kv_events(first_id, events)

    def unhealthy(self, reason: str) -> None:
        """Say so and end: the process is the fence around what may still be written."""
        _log.critical("worker unhealthy, exiting: %s", reason)
        self.refuse("unhealthy")
        self._mailer.flush_now()
        asyncio.get_running_loop().call_later(0.2, self._end_process, EXIT_UNHEALTHY)

    # --- mail ---

    def _post(self, router: str, out: Out) -> None:
        self._mailer.post(self._subjects.out(router, self._worker), out)

    def _envelope(self, subject: str, outs: list[Out]) -> bytes:
        seq = self._routers.next_seq(self._subjects.router_of(subject))
        return encode(OutEnvelope(self._worker, self._incarnation, seq, outs))

    def _on_overflow(self, subject: str, outs: list[Out]) -> None:
        """The number is used up, so the router sees the gap and asks again."""
        _log.warning("bus is full, dropped outcomes=%d for %s", len(outs), subject)

    def _bad_message(self, subject: str, error: Exception) -> None:
        """Count rubbish; say so once a minute."""
        self.num_bad += 1
        now = self._clock()
        if now - self._bad_logged_at >= GRUMBLE_S:
            _log.warning("ignored bad messages count=%d last=%s: %s", self.num_bad, subject, error)
            self._bad_logged_at = now


def _engine_job(key: JobKey, job: Prefill | Decode) -> PrefillJob | DecodeJob:
    """Raises ValueError for token ids that are no whole number of them."""
    prompt = job.prompt if isinstance(job.prompt, Body) else unpack_ids(job.prompt.packed)
    output = unpack_ids(job.output)
    common = (key, job.choice, prompt, job.sampling)
    rest = (output, job.chars_sent, job.cache_salt)
    if isinstance(job, Prefill):
        return PrefillJob(*common, *rest)
    return DecodeJob(*common, job.handle, *rest)

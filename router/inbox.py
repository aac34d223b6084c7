"""What workers say to this router: envelopes in, deltas to their streams, legs to the scheduler.

The token path: `on_out` -> `_on_frame` -> the choice's sink; first, last and odd deltas pass
`_deliver`. What names no attempt of ours changes nothing and is answered with a cancel.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from protocol.bus import Message
from protocol.codec import decode_out
from protocol.errors import BadMessage
from protocol.ids import is_name
from protocol.jobs import Cancel, Job, Release, Replay
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Leg,
    Out,
    OutEnvelope,
    Prefilled,
    Progress,
    Refused,
    StepFrame,
)
from protocol.subjects import Subjects
from router import claims
from router.attempts import Attempt, Attempts, Strays
from router.choices import Choice
from router.metrics import RouterMetrics
from router.pairs import Way
from router.scheduling import events as ev

_log = logging.getLogger("baton.router")

Outcome = Accepted | Refused | Progress | Prefilled | Decoding | Failed

REPLAY_S: Final = 0.2
"""The same hole of a stream is asked for this often at most."""
TAIL_S: Final = 0.15
"""An envelope may be overtaken by a load report for so long."""
NO_DELTA: Final = "a delta that cannot be"
MAX_SOURCES: Final = 16_384


@dataclass(slots=True, eq=False)
class _Source:
    """How much of what one worker process said has arrived."""

    seen: int = 0
    tail: int = 0
    """While above 0: a report has named this number, and soon it is looked for."""


class Post(Protocol):
    def __call__(self, worker: str, incarnation: str, job: Job, *, lazy: bool = False) -> None: ...


class Inbox:
    """Reads one router's `out` mailbox."""

    def __init__(
        self,
        attempts: Attempts,
        *,
        subjects: Subjects,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        feed: Callable[[ev.Event], None],
        post: Post,
        later: Callable[[float, Callable[[], None]], object],
        is_known: Callable[[str, str], bool] = lambda _worker, _incarnation: True,
        tell: Callable[[str, str, str, str], None] = lambda _choice, _kind, _cause, _worker: None,
    ) -> None:
        """`is_known`: whether that worker process still counts; the others are not numbered.
        `tell`: what belongs into a choice's story."""
        self._attempts = attempts
        self._subjects = subjects
        self._metrics = metrics
        self._clock = clock
        self._feed = feed
        self._post = post
        self._later = later
        self._is_known = is_known
        self._tell = tell
        self._transports = claims.Labels()
        self._sources: dict[tuple[str, str], _Source] = {}
        self._strays = Strays()
        self._on_client_gone: dict[str, Callable[[], None]] = {}
        self._bad = 0
        self._bad_logged_at = float("-inf")

    def watch_client(self, token: str, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` when the bus says that the client of this token stopped listening."""
        self._on_client_gone[token] = on_gone

    def unwatch_client(self, token: str) -> None:
        self._on_client_gone.pop(token, None)

    def sources(self) -> list[tuple[str, str]]:
        """Worker processes that have said something to us."""
        return list(self._sources)

    def on_out(self, message: Message) -> None:
        if message.no_responders:
            self._on_gone(message.subject)
            return
        try:
            envelope = decode_out(message.payload)
        except BadMessage as error:
            self.bad_message(message.subject, error)
            return
        if not (message.subject.endswith(f".{envelope.worker}") and is_name(envelope.incarnation)):
            self.bad_message(message.subject, BadMessage("another worker's name"), "wrong_name")
            return
        now = self._clock()
        source = self._source(envelope.worker, envelope.incarnation)
        gap = envelope.seq > source.seen + 1
        source.seen = max(source.seen, envelope.seq)
        for out in envelope.outs:
            if type(out) is StepFrame:
                self._on_frame(envelope, out, now)
            else:
                self._on_outcome(envelope, out, now)
        if gap:
            self._feed(ev.GapSeen(envelope.worker, envelope.incarnation))

    def _source(self, worker: str, incarnation: str) -> _Source:
        key = (worker, incarnation)
        source = self._sources.get(key)
        if source is None:
            if not self._is_known(worker, incarnation):
                return _Source(seen=sys.maxsize)
            if len(self._sources) >= MAX_SOURCES:
                del self._sources[next(iter(self._sources))]
            source = self._sources[key] = _Source()
        return source

    def ask_replay(self, number: int, entry: Attempt, now: float, cause: str) -> None:
        """Ask for what the stream does not have yet."""
        have = len(entry.choice.output)
        entry.asked_at, entry.asked_from = now, have
        self._tell(entry.choice.id, "replay", cause, entry.worker)
        self._post(entry.worker, entry.incarnation, Replay(number, have))

    def _on_frame(self, envelope: OutEnvelope, frame: StepFrame, now: float) -> None:
        """The way of every token, so without detours: one more token in its turn goes straight to
        its sink; whatever else a delta may be is `_deliver`'s."""
        attempts = self._attempts.live
        worker, incarnation = envelope.worker, envelope.incarnation
        gap = -1.0
        for delta in frame.deltas:
            entry = attempts.get(delta.attempt)
            if entry is None or entry.incarnation != incarnation or entry.worker != worker:
                self._stray(envelope, delta.attempt, now)
                continue
            choice = entry.choice
            if gap < 0.0 and choice.last_at:
                gap = now - choice.last_at
                self._metrics.token_gap(choice.spec.model, gap)
            ids, output = delta.ids, choice.output
            is_next = 0 < len(output) == delta.index < choice.max_tokens
            if not is_next or len(ids) != 1 or delta.finish:
                self._deliver(delta.attempt, entry, delta, now)
                continue
            try:
                output.append(ids[0])
            except OverflowError:
                self._disbelieve(delta.attempt, entry, NO_DELTA)
                continue
            entry.heard_at = choice.last_at = now
            choice.chars += len(delta.text)
            try:
                choice.sink.delta(choice, delta)
            except Exception:  # noqa: BLE001  the other streams of this frame must get theirs
                self._on_stream_failed(choice)
        self._metrics.tokens(len(frame.deltas))

    def _deliver(self, number: int, entry: Attempt, delta: Delta, now: float) -> None:
        """Give one delta of the attempt `number` to its stream, exactly once and in order. What
        brings nothing new is no sign of life: it could be said for ever."""
        choice = entry.choice
        have = len(choice.output)
        if delta.index != have:
            asked_now = entry.asked_from == have and now - entry.asked_at < REPLAY_S
            if delta.index > have and not asked_now:  # something before it was lost
                self._metrics.note("replay", "hole")
                self.ask_replay(number, entry, now, "hole")
            return
        if not have and not self._begins(number, entry, now):
            return
        ids = claims.new_ids(delta, have, choice.max_tokens)
        if ids is None:
            self._disbelieve(number, entry, NO_DELTA)
            return
        entry.heard_at = now
        choice.output.extend(ids)
        choice.chars += len(delta.text)
        choice.last_at = now
        choice.finish = delta.finish
        try:
            choice.sink.delta(choice, delta)
        except Exception:  # noqa: BLE001
            self._on_stream_failed(choice)
            return
        if delta.finish and entry.leg == "decode":
            self._feed(ev.Ended(number))

    def _on_stream_failed(self, choice: Choice) -> None:
        _log.exception("a stream failed choice=%s", choice.id)
        self._feed(ev.ClientGone(choice.id))

    def _disbelieve(self, number: int, entry: Attempt, what: str) -> None:
        """The worker said what cannot be true: the attempt is over, whatever else it may say."""
        self._metrics.note("disbelieved", what.replace(" ", "_"))
        _log.warning("disbelieved worker=%s choice=%s: %s", entry.worker, entry.choice.id, what)
        leg: Leg = "prefill" if entry.leg == "prefill" else "decode"
        self._feed(ev.AttemptFailed(number, leg, "engine", f"{entry.worker} said {what}"))

    def _begins(self, number: int, entry: Attempt, now: float) -> bool:
        """Whether a stream may have its first token: not before what belongs in front of it, which
        was lost if the token is here. A worker that has said its part has no more to say."""
        choice = entry.choice
        if choice.lacks_prompt and not (entry.prefilled or entry.decoding):
            if now - entry.asked_at >= REPLAY_S:
                self._metrics.note("replay", "lost_prompt")
                self.ask_replay(number, entry, now, "lost_prompt")
            return False
        if not choice.first_at:
            choice.first_at = now
            self._metrics.first_token(choice.spec.model, now - choice.arrived_at)
        return True

    def _on_outcome(self, envelope: OutEnvelope, out: Out, now: float) -> None:
        if isinstance(out, StepFrame):
            return
        entry = self._attempts.live.get(out.attempt)
        if entry is None or not entry.is_of(envelope):
            self._on_stray_outcome(envelope, out, now)
            return
        handle = out.handle if isinstance(out, Accepted | Prefilled) else None
        if handle and not claims.is_own_handle(handle, entry.worker, entry.incarnation):
            self._disbelieve(out.attempt, entry, "a handle that cannot be")
            return
        self._on_own_outcome(entry, out, now)

    def _on_own_outcome(self, entry: Attempt, out: Outcome, now: float) -> None:
        match out:
            case Accepted():
                if out.handle is not None:
                    entry.choice.lent_at = entry.choice.lent_at or now
                self._feed(ev.Accepted(out.attempt, out.handle))
            case Refused():
                reason = claims.refusal(out.reason)
                self._metrics.note("refused", reason)
                self._tell(entry.choice.id, "refused", reason, entry.worker)
                self._feed(ev.Refused(out.attempt, reason))
            case Progress():
                if entry.advance.moved(out.done, out.total):
                    self._feed(ev.Progressed(out.attempt))
                else:
                    self._metrics.note("late", "no_progress")
            case Prefilled():
                self._on_prefilled(entry, out, now)
            case Decoding():
                self._on_decoding(entry, out, now)
            case Failed():
                self._on_failed(entry, out)

    def _on_stray_outcome(
        self,
        envelope: OutEnvelope,
        out: "Accepted | Refused | Progress | Prefilled | Decoding | Failed",
        now: float,
    ) -> None:
        if isinstance(out, Failed | Refused) or self._attempts.is_done(out.attempt):
            return
        self._stray(envelope, out.attempt, now)
        if isinstance(out, Prefilled | Accepted) and out.handle is not None:
            release = Release([out.handle.handle_id])
            self._post(envelope.worker, envelope.incarnation, release)

    def _on_failed(self, entry: Attempt, out: Failed) -> None:
        self._metrics.note("failed", out.code)
        message = claims.text(out.message)
        _log.info(
            "attempt failed choice=%s worker=%s leg=%s code=%s message=%s",
            entry.choice.id,
            entry.worker,
            out.leg,
            out.code,
            message,
        )
        self._feed(ev.AttemptFailed(out.attempt, out.leg, out.code, message))

    def _on_prefilled(self, entry: Attempt, out: Prefilled, now: float) -> None:
        if entry.prefilled:  # a repeat of what we have, after a replay
            return
        entry.prefilled = True
        choice = entry.choice
        if out.handle is not None:
            choice.lent_at = now
        cached = claims.count(out.cached_tokens, choice.spec.num_prompt_tokens)
        if not choice.output:
            choice.cached_tokens = cached
        if choice.prompt_logprobs is None:
            choice.prompt_logprobs = out.prompt_logprobs
        queue_s, prefill_s = claims.seconds(out.queue_s), claims.seconds(out.prefill_s)
        self._metrics.prefilled(choice.spec.model, queue_s, prefill_s)
        if out.first is not None:
            self._deliver(out.attempt, entry, out.first, now)
        ended = out.first is not None and bool(out.first.finish)
        self._feed(ev.Prefilled(out.attempt, out.handle, ended, cached))

    def _on_decoding(self, entry: Attempt, out: Decoding, now: float) -> None:
        choice = entry.choice
        if not entry.decoding:  # else a repeat, which is only a sign of life
            entry.decoding = True
            if not choice.output and out.cached_tokens:
                most = choice.spec.num_prompt_tokens
                choice.cached_tokens = claims.count(out.cached_tokens, most)
            if choice.prompt_logprobs is None:
                choice.prompt_logprobs = out.prompt_logprobs
            self._on_transfer(entry, out)
            if choice.lent_at:
                self._metrics.handle_used(choice.spec.model, now - choice.lent_at)
                choice.lent_at = 0.0
        self._feed(ev.DecodingStarted(out.attempt))

    def _on_transfer(self, entry: Attempt, out: Decoding) -> None:
        num_bytes = claims.count(out.transfer_bytes)
        transport = self._transports.of(out.transport) if out.transport else ""
        if transport:
            took_s = claims.seconds(out.transfer_s)
            self._metrics.transfer(entry.choice.spec.model, transport, num_bytes, took_s)
        source = claims.name(out.source)
        if source:
            way = Way(transport, claims.text(out.transport_reason))
            self._metrics.pairs.used(source, entry.worker, way, num_bytes)

    def _stray(self, envelope: OutEnvelope, attempt: int, now: float) -> None:
        """An attempt we do not have: tell the worker to stop it, once a second at most."""
        if self._attempts.is_done(attempt):
            return
        if not self._strays.is_due(envelope.incarnation, attempt, now):
            return
        self._metrics.note("late", "stray")
        self._post(envelope.worker, envelope.incarnation, Cancel(attempt))

    def _on_gone(self, subject: str) -> None:
        gone = self._subjects.gone_worker(subject)
        if gone is not None:
            self._feed(ev.WorkerUnreachable(*gone))
            return
        token = self._subjects.client_of(subject)
        on_gone = self._on_client_gone.pop(token, None) if token else None
        if on_gone is not None:
            on_gone()

    def bad_message(self, subject: str, error: BadMessage, cause: str = "undecodable") -> None:
        """Count rubbish; say so once a minute."""
        self._metrics.note("bad_message", cause)
        self._bad += 1
        now = self._clock()
        if now - self._bad_logged_at >= 60.0:
            _log.warning("ignored bad messages count=%d last=%s: %s", self._bad, subject, error)
            self._bad_logged_at = now
            self._bad = 0

    def reported(self, worker: str, incarnation: str, last_seq: int) -> None:
        """A load report says how many envelopes we were sent. What has not come a little later is
        lost (now, the report may just have overtaken it)."""
        source = self._sources.get((worker, incarnation))
        if source is None:
            if last_seq == 0:
                return
            source = self._source(worker, incarnation)
        if last_seq > source.seen and not source.tail:
            source.tail = last_seq
            self._later(TAIL_S, partial(self._look_for_tail, source, worker, incarnation))

    def _look_for_tail(self, source: _Source, worker: str, incarnation: str) -> None:
        tail, source.tail = source.tail, 0
        if tail > source.seen:
            source.seen = tail
            self._feed(ev.GapSeen(worker, incarnation))

    def forget_worker(self, worker: str, incarnation: str) -> None:
        self._sources.pop((worker, incarnation), None)

    def forget_unknown(self) -> None:
        """Keep the numbers of those worker processes alone that still count."""
        for gone in [source for source in self._sources if not self._is_known(*source)]:
            del self._sources[gone]

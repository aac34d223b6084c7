"""What a stepped engine does in one turn, without thread, loop or clock of its own.

Messages go in, one turn runs, outputs come out. It is the only mutator of its sequences, of the
pool, of leases and of pulls. It knows neither the bus nor which model computes.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from protocol.errors import LocalError
from protocol.ids import JobKey
from protocol.out import Delta, FailureCode, Leg
from text.tokenizer import Tokenizer
from worker.engine import telling
from worker.engine.base import DecodeJob, DecodingInfo, EngineError, EngineStats, Load, PrefillJob
from worker.engine.grammar import GrammarError
from worker.engine.grammar_desk import COMPILE_TIMEOUT_S, GrammarDesk
from worker.engine.lending import Lender
from worker.engine.messages import (
    Cancel,
    Drain,
    GrammarMade,
    Message,
    OperationEnded,
    Release,
    Renew,
    StepperConfig,
    Submit,
)
from worker.engine.outputs import TurnOutputs
from worker.engine.pulling import PROGRESS_S, Puller, PullLost, PullMoved, PullOutcome, PullReady
from worker.engine.roster import Planned, Roster
from worker.engine.runner import Chunk, ModelRunner
from worker.engine.sequences import (
    ActiveSequence,
    ModelLimits,
    SequenceRefused,
    Stage,
    build_sequence,
)
from worker.kv.pool import BlockPool

_log: Final = logging.getLogger("baton.engine")


class EngineCore:
    """One engine's state. Every method but `stats` is called by the engine's thread."""

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        lender: Lender,
        puller: Puller,
        grammars: GrammarDesk,
        *,
        tokenizer: Tokenizer,
        limits: ModelLimits,
        config: StepperConfig,
        num_blocks: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._lender = lender
        self._puller = puller
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._limits = limits
        self._config = config
        self._num_blocks = num_blocks
        self._clock = clock
        self._roster = Roster(pool, num_blocks=num_blocks, block_size=limits.block_size)
        self._known: dict[JobKey, ActiveSequence] = {}
        self._compiling: list[ActiveSequence] = []
        """Wait for their grammar, the longest waiting first."""
        self._drains: list[asyncio.Event] = []
        self._broken = ""
        self._num_events = 0
        self._num_steps = 0
        self._prefilled_tokens = self._cached_tokens = self._decoded_tokens = 0
        self._outputs = TurnOutputs()

    def handle(self, message: Message, now: float) -> None:
        """Take one message."""
        match message:
            case Submit(job=job, serial=serial):
                self._submit(job, serial, now)
            case Cancel(key=key):
                self._cancel(key, now)
            case Renew(handle_ids=handle_ids):
                self._lender.renew(handle_ids, now)
            case Release(handle_ids=handle_ids):
                self._lender.release(handle_ids, now)
            case Drain(event=event, wanted=wanted):
                if wanted:
                    self._drains.append(event)
                elif event in self._drains:
                    self._drains.remove(event)
            case OperationEnded():
                self._settle(self._puller.ended(message, now), now)
            case GrammarMade():
                self._take_grammar(message, now)

    def turn(self, now: float) -> bool:
        """Do what is due. True if there may be more to do at once."""
        self._lender.expire(now)
        self._settle(self._puller.tick(now), now)
        self._give_up_grammars(now)
        before = self._roster.num_preempted
        self._admit(now)
        for standing in (self._roster.waiting, self._compiling):
            telling.waiting(self._outputs, standing, now)
        planned = self._roster.plan(max_step_tokens=self._config.max_step_tokens)
        if planned:
            self._compute(planned)
        if planned or self._known:
            self._num_steps += 1
        if self._puller.over_bound and not self._broken:
            self._break("too many blocks are in quarantine: transfers do not end")
        if self._config.validate:
            self._pool.validate()
            self._lender.validate()
            self._puller.validate()
        return bool(planned) or self._roster.num_preempted > before

    def take_outputs(self) -> TurnOutputs:
        """What is to be said since the last call."""
        outputs = self._outputs
        events = self._pool.take_events()
        if events:
            outputs.first_event, outputs.events = self._num_events + 1, events
            self._num_events += len(events)
        if self._drains and not self._known and not self._lender.num_lent:
            outputs.drained, self._drains = self._drains, []
        self._outputs = TurnOutputs()
        return outputs

    def collapse(self, reason: str) -> TurnOutputs:
        """Our own rules were broken: nothing of the state can be trusted or touched any more."""
        outputs = TurnOutputs(unhealthy="" if self._broken else reason)
        self._broken = self._broken or reason
        for sequence in self._known.values():
            telling.failed(outputs, sequence, "engine", reason)
        self._known.clear()
        outputs.drained, self._drains = self._drains, []
        return outputs

    def refuse(self, message: Message) -> TurnOutputs:
        """Answer a message after `collapse`."""
        outputs = TurnOutputs()
        if isinstance(message, Submit):
            key = message.job.key
            error = EngineError("decode", "engine", self._broken)
            outputs.note(key, message.serial, lambda outlet: outlet.failed(key, error), ends=True)
        elif isinstance(message, Drain):
            outputs.drained.append(message.event)
        return outputs

    def next_deadline(self, now: float) -> float | None:
        """When `turn` is due though no message came. While there is work, soon: the step counter
        shows that the thread lives."""
        deadlines = [self._lender.next_deadline(), self._puller.next_deadline()]
        if self._known:
            deadlines.append(now + PROGRESS_S)
        return min((at for at in deadlines if at is not None), default=None)

    def load(self) -> Load:
        counts = self._pool.counts()
        return Load(
            running=len(self._roster.running) + self._puller.num_pulling,
            waiting=len(self._roster.waiting) + len(self._compiling),
            num_blocks=self._num_blocks,
            free_blocks=self._pool.num_available,
            cached_blocks=counts.cached,
            lent_blocks=counts.lent,
            quarantined_blocks=counts.quarantined,
            steps=self._num_steps,
        )

    def stats(self) -> EngineStats:
        """From any thread, so that no turn makes what is seldom asked for: numbers, and copies that
        the interpreter makes without a break."""
        return EngineStats(
            leases_ended=self._lender.ended,
            transfers=dict(self._puller.counts.results),
            transfer_bytes=dict(self._puller.counts.num_bytes),
            pairs=self._puller.pairs.ways(),
            preemptions=self._roster.num_preempted,
            prefilled_tokens=self._prefilled_tokens,
            cached_tokens=self._cached_tokens,
            decoded_tokens=self._decoded_tokens,
        )

    # messages

    def _submit(self, job: PrefillJob | DecodeJob, serial: int, now: float) -> None:
        key, outputs = job.key, self._outputs
        if key in self._known or key in self._lender:  # a repeat that came after `Done`
            late = EngineError("prefill", "aborted", "the attempt was here before")
            outputs.note(key, serial, lambda outlet: outlet.failed(key, late), ends=True)
            return
        try:
            if self._broken:
                raise SequenceRefused("engine", self._broken)
            sequence = build_sequence(job, self._limits, self._tokenizer, serial=serial, now=now)
        except SequenceRefused as refusal:
            leg: Leg = "prefill" if isinstance(job, PrefillJob) else "decode"
            error = EngineError(leg, refusal.code, str(refusal))
            outputs.note(key, serial, lambda outlet: outlet.failed(key, error), ends=True)
            return
        end = sequence.end_of_given()
        if end is not None:
            self._end_at_once(sequence, end)
            return
        self._known[key] = sequence
        outputs.taken[key] = serial
        if sequence.stage is Stage.COMPILING:
            self._compiling.append(sequence)
            if not self._grammars.request(key, serial, job.sampling, job.output_ids):
                self._fail(sequence, "aborted", "too many schemas wait to be compiled", now)
        else:
            self._roster.waiting.append(sequence)

    def _cancel(self, key: JobKey, now: float) -> None:
        sequence = self._known.get(key)
        if sequence is None:
            self._lender.revoke(key, now)
            return
        self._outputs.taken.pop(key, None)
        self._drop(sequence, now)

    def _end_at_once(self, sequence: ActiveSequence, end: Delta) -> None:
        """What the client already has was a whole answer."""
        if sequence.is_prefill:
            telling.prefilled(self._outputs, sequence, end, None, sequence.submitted_at)
        else:
            telling.decoding(self._outputs, sequence, DecodingInfo())
            self._outputs.delta(sequence.key, sequence.serial, end)

    # grammars

    def _take_grammar(self, message: GrammarMade, now: float) -> None:
        sequence = self._known.get(message.key)
        if sequence is None or sequence.serial != message.serial:
            return
        if isinstance(message.result, str):
            self._fail(sequence, "invalid_request", f"grammar: {message.result}", now)
            return
        self._compiling.remove(sequence)
        sequence.grammar = message.result
        sequence.stage = Stage.WAITING
        self._roster.waiting.append(sequence)
        end = sequence.end_of_given()
        if end is not None:
            self._end_at_once(sequence, end)
            self._drop(sequence, now)

    def _give_up_grammars(self, now: float) -> None:
        while self._compiling and now - self._compiling[0].submitted_at > COMPILE_TIMEOUT_S:
            # Perhaps others' schemas are the hard ones: another worker may try.
            message = f"no grammar after {COMPILE_TIMEOUT_S:g} s"
            self._fail(self._compiling[0], "engine", message, now)

    # admission

    def _admit(self, now: float) -> None:
        """In order of arrival; who waits for another one's prefix or lease lets later ones pass."""
        roster, passed = self._roster, 0
        num_leases = self._num_lendable() if roster.waiting else 0
        while passed < len(roster.waiting):
            num_active = len(roster.running) + self._puller.num_pulling
            if num_active >= self._config.max_running:
                return
            sequence = roster.waiting[passed]
            if (sequence.is_prefill and num_leases <= 0) or roster.follows(sequence):
                passed += 1
                continue
            if not roster.place(sequence, alone=num_active == 0):
                return
            del roster.waiting[passed]
            if sequence.started_at is None:
                sequence.started_at = sequence.reported_at = now
            self._cached_tokens += sequence.cached_tokens
            num_leases -= sequence.is_prefill
            if sequence.handle is None:
                roster.run(sequence)
            else:
                sequence.stage = Stage.PULLING
                self._settle(self._puller.begin(sequence, now), now)

    def _num_lendable(self) -> int:
        """Leases that no running prefill will need. One that could not be lent when it is done
        would stand in the way of those whose pulls end the leases, and of its own end for ever."""
        running = sum(sequence.is_prefill for sequence in self._roster.running)
        return self._lender.num_free_slots - running

    def _settle(self, outcomes: Sequence[PullOutcome], now: float) -> None:
        for outcome in outcomes:
            sequence = outcome.sequence
            match outcome:
                case PullReady(info=info):
                    self._arrived(sequence, info)
                case PullLost(code=code, message=message):
                    self._fail(sequence, code, message, now)
                case PullMoved(done=done, total=total):
                    telling.progress(self._outputs, sequence, "transfer", done, total, now)

    def _arrived(self, sequence: ActiveSequence, info: DecodingInfo) -> None:
        """Its KV is here; the last token's is computed again if nothing else is left to compute."""
        if sequence.handle is not None:
            there = min(sequence.handle.num_tokens, len(sequence.ids) - 1)
            sequence.num_computed = max(sequence.num_computed, there)
            sequence.handle = None
        self._roster.store_full_blocks(sequence)
        telling.decoding(self._outputs, sequence, info)
        self._roster.run(sequence)

    # one step

    def _compute(self, planned: Sequence[Planned]) -> None:
        chunks = [sequence.chunk(count) for sequence, count in planned]
        if self._config.validate:
            self._roster.validate(chunks)
        try:
            tokens = self._runner.step(chunks)
        except Exception as error:  # noqa: BLE001  a model may raise anything
            _log.exception("a step failed")
            self._break(f"a step of the model failed: {error!r}")
            return
        now = self._clock()
        for (sequence, _), chunk, token in zip(planned, chunks, tokens, strict=True):
            try:
                self._advance(sequence, chunk, token, now)
            except GrammarError as error:
                self._fail(sequence, "invalid_request", f"grammar: {error}", now)

    def _advance(
        self, sequence: ActiveSequence, chunk: Chunk, token: int | None, now: float
    ) -> None:
        start, count = chunk.start, len(chunk.ids)
        if start < sequence.num_given:
            self._prefilled_tokens += min(count, sequence.num_given - start)
        sequence.num_computed = start + count
        self._roster.store_full_blocks(sequence)
        if chunk.scores is not None and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += chunk.scores.prompt
        if token is None:
            done, total = sequence.num_computed, len(sequence.ids)
            telling.progress(self._outputs, sequence, sequence.runs, done, total, now)
            return
        self._decoded_tokens += 1
        delta = sequence.take(token, chunk.scores)
        if sequence.is_prefill:
            self._prefilled(sequence, delta, now)
            return
        if not sequence.told_decoding:
            telling.computed(self._outputs, sequence)
        self._outputs.delta(sequence.key, sequence.serial, delta)
        if delta.finish:
            self._drop(sequence, now)

    def _prefilled(self, sequence: ActiveSequence, first: Delta, now: float) -> None:
        if first.finish:
            telling.prefilled(self._outputs, sequence, first, None, now)
            self._drop(sequence, now)
            return
        handle = self._lender.lend(sequence, now)
        if handle is None:
            raise LocalError("a prefill has run for which there is no lease")
        telling.prefilled(self._outputs, sequence, first, handle, now)
        self._drop(sequence, now)

    # endings

    def _fail(self, sequence: ActiveSequence, code: FailureCode, message: str, now: float) -> None:
        telling.failed(self._outputs, sequence, code, message)
        self._drop(sequence, now)

    def _drop(self, sequence: ActiveSequence, now: float) -> None:
        """It is over here, wherever it stands."""
        if sequence.stage is Stage.PULLING:
            self._puller.abandon(sequence, now)
        elif sequence.stage is Stage.COMPILING:
            self._compiling.remove(sequence)
            self._grammars.withdraw(sequence.key, sequence.sampling.grammar)
        self._roster.drop(sequence)
        del self._known[sequence.key]

    def _break(self, reason: str) -> None:
        """The engine cannot go on: every sequence fails; leases and transfers live on."""
        self._broken = reason
        self._outputs.unhealthy = reason
        for sequence in list(self._known.values()):
            self._fail(sequence, "engine", reason, self._clock())

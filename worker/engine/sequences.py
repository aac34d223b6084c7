"""One choice inside a stepped engine: its tokens, its blocks, its text, and when it ends.

Everything here is a function of prompt, output and sampling, which is why another worker can go on
with a choice. It knows no pool, no transfer, no thread and no clock.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from protocol.blocks import block_hashes, content_hash_from, seed_of
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.jobs import Body
from protocol.out import Delta, FailureCode, Finish, Leg, TokenLogprob
from protocol.sampling import Sampling
from text.output import OutputText, ResumeError
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.grammar import GrammarState
from worker.engine.runner import Chunk, Scores


class SequenceRefused(Exception):
    """The job can never run here; the router is told `code` and the message."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code


class Stage(Enum):
    """Where a sequence is."""

    COMPILING = "compiling"
    """For its grammar; holds no blocks."""
    WAITING = "waiting"
    """For blocks or a place; holds no blocks."""
    PULLING = "pulling"
    """Its KV is on the way."""
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model and this worker's memory allow."""

    model_digest: str
    block_size: int
    vocab_size: int
    max_context: int
    """Tokens of one sequence, prompt and output together."""
    eos_ids: frozenset[int]


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A job and how far it is. `ids[num_computed:]` are the tokens whose KV is missing."""

    key: JobKey
    serial: int
    """Order of submission; the highest is the youngest."""
    is_prefill: bool
    handle: KvHandle | None
    """Set until its KV is here."""
    ids: "array[int]"
    """Prompt and output."""
    num_prompt: int
    num_given: int
    """Prompt and output that came with the job."""
    sampling: Sampling
    limits: ModelLimits
    seed: bytes
    """The chained hash before the first block."""
    text: OutputText
    carry: str
    """Text of the given output that may be sent and was not: goes out with the next token."""
    submitted_at: float
    reported_at: float
    stage: Stage = Stage.WAITING
    started_at: float | None = None
    blocks: list[int] = field(default_factory=list)
    """The block table. A new list for every stay in the pool."""
    num_computed: int = 0
    num_stored: int = 0
    """Leading blocks that are in the prefix cache (or equal to ones that are)."""
    cached_tokens: int = 0
    told_decoding: bool = False
    hashes: list[bytes] = field(default_factory=list)
    refused_at: tuple[int, int] | None = None
    """The state of the pool in which it had no room: not tried again before that changes."""
    grammar: GrammarState | None = None
    """Behind the last of `ids`."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """What is known so far, if it was asked for and has not been told; None for the first token."""
    leader: "tuple[ActiveSequence, int] | None" = None
    """Who computes a prefix of it, and the last block that they share: see `Roster.follows`."""

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def leg(self) -> Leg:
        """For errors."""
        if self.is_prefill:
            return "prefill"
        return "transfer" if self.handle is not None else "decode"

    @property
    def runs(self) -> Leg:
        """What it does, or will do when it runs (again)."""
        if self.handle is not None:
            return "transfer"
        return "decode" if self.told_decoding else "prefill"

    def hash_full_blocks(self) -> list[bytes]:
        """The hashes of all full blocks of `ids`."""
        size = self.limits.block_size
        start, end = len(self.hashes) * size, len(self.ids) // size * size
        if end > start:
            parent = self.hashes[-1] if self.hashes else self.seed
            self.hashes += block_hashes(self.ids[start:end].tobytes(), size, parent)
        return self.hashes

    def content_hash(self, num_tokens: int) -> bytes:
        """One hash of the first `num_tokens` tokens under our own model."""
        size = self.limits.block_size
        hashes = self.hash_full_blocks()[: num_tokens // size]
        return content_hash_from(hashes, self.ids[:num_tokens].tobytes(), size, self.seed)

    def chunk(self, count: int) -> Chunk:
        """The next `count` tokens to compute, for the model."""
        start, ids = self.num_computed, self.ids
        end, num_output = start + count, len(ids) - self.num_prompt
        scores = None
        if self.sampling.logprobs >= 0 or self.prompt_logprobs is not None:
            scores = self._scores()
        return Chunk(
            blocks=self.blocks,
            ids=ids[start:end],
            start=start,
            sample=end == len(ids),
            sampling=self.sampling,
            output_index=num_output,
            num_output=num_output,
            history=ids,
            num_prompt=self.num_prompt,
            allowed=None if self.grammar is None else self.grammar.allowed,
            scores=scores,
        )

    def take(self, token: int, scores: Scores | None = None) -> Delta:
        """The sampled `token` is the next of the output; what the client gets for it.

        Errors: GrammarError if the grammar cannot go on behind it.
        """
        index = self.num_output
        if index >= self.sampling.max_tokens:  # only the prompt's log-probabilities were wanted
            rest, finish, stop = self._flush("length", None)
            return self._end(self.carry + rest, finish, stop)
        self.ids.append(token)
        text, finish, stop = self._read(token, index)
        if self.carry:
            text, self.carry = self.carry + text, ""
        delta = Delta(self.key.attempt, index, [token], text, finish, stop)
        if scores is not None and scores.sampled is not None:
            delta.logprobs = [scores.sampled]
        return delta

    def end_of_given(self) -> Delta | None:
        """The end of the choice, without a token, if the given output is one already."""
        index = self.num_output
        if self.text.stop is not None:
            return self._end(self.carry, "stop", self.text.stop)
        if index and self._ends_choice(self.ids[-1], index - 1):
            text, finish, stop = self._flush("stop", self._token_stop(self.ids[-1]))
            return self._end(self.carry + text, finish, stop)
        if self.grammar is not None and self.grammar.is_over:
            text, finish, stop = self._flush("stop", None)
            return self._end(self.carry + text, finish, stop)
        if self._is_full() and self.prompt_logprobs is None:
            text, finish, stop = self._flush("length", None)
            return self._end(self.carry + text, finish, stop)
        return None

    def forget_blocks(self) -> list[int]:
        """Give the block table back; everything is to be computed again."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = self.num_stored = 0
        self.refused_at = None
        self.leader = None
        return blocks

    def _scores(self) -> Scores:
        scores = Scores(num_top=self.sampling.logprobs)
        if self.prompt_logprobs is not None:
            scores.prompt_num_top = self.sampling.prompt_logprobs
            scores.prompt_from = len(self.prompt_logprobs)
        return scores

    def _read(self, token: int, index: int) -> tuple[str, Finish, str | int | None]:
        if self._ends_choice(token, index):
            stop = self._token_stop(token)
            shown = ""
            if stop is not None and self.sampling.include_stop:
                shown = self.text.push(token).text
            rest, finish, named = self._flush("stop", stop)
            return shown + rest, finish, named
        if self.grammar is not None:
            self.grammar.advance(token)
        piece = self.text.push(token)
        if piece.stop is not None:
            return piece.text, "stop", piece.stop
        is_whole = self.grammar is not None and self.grammar.is_over
        if not is_whole and not self._is_full():
            return piece.text, "", None
        rest, finish, named = self._flush("stop" if is_whole else "length", None)
        return piece.text + rest, finish, named

    def _flush(
        self, finish: Finish, stop: str | int | None
    ) -> tuple[str, Finish, str | int | None]:
        """The held text; it may complete a stop string itself."""
        rest = self.text.finish()
        if rest.stop is not None:
            return rest.text, "stop", rest.stop
        return rest.text, finish, stop

    def _ends_choice(self, token: int, index: int) -> bool:
        """Whether `token`, as output `index`, ends the choice by itself."""
        sampling = self.sampling
        if index < sampling.min_tokens:
            return False
        is_eos = token in self.limits.eos_ids and not sampling.ignore_eos
        return is_eos or token in sampling.stop_token_ids

    def _token_stop(self, token: int) -> int | None:
        """What the client is told: the model's own end needs no name."""
        is_eos = token in self.limits.eos_ids and not self.sampling.ignore_eos
        return None if is_eos else token

    def _is_full(self) -> bool:
        length = len(self.ids)
        full = self.num_prompt + self.sampling.max_tokens
        return length >= full or length >= self.limits.max_context

    def _end(self, text: str, finish: Finish, stop: str | int | None) -> Delta:
        return Delta(self.key.attempt, self.num_output, [], text, finish, stop)


def build_sequence(
    job: PrefillJob | DecodeJob,
    limits: ModelLimits,
    tokenizer: Tokenizer,
    *,
    serial: int,
    now: float,
) -> ActiveSequence:
    """The sequence of a job. Errors: SequenceRefused."""
    if isinstance(job.prompt, Body):
        raise SequenceRefused("invalid_request", "this engine takes token ids, not a body")
    ids = _checked_ids(job.prompt, job.output_ids, limits)
    _check_sampling(job.sampling, limits)
    text, carry = _resumed_text(job, tokenizer)
    handle = job.handle if isinstance(job, DecodeJob) else None
    num_prompt = len(job.prompt)
    if handle is not None and not num_prompt <= handle.num_tokens <= len(ids):
        raise SequenceRefused(
            "handle_mismatch",
            f"the handle is of {handle.num_tokens} tokens, the job of {num_prompt} to {len(ids)}",
        )
    # Whoever goes on with a choice need not say again what its prompt's tokens are worth.
    is_scored = job.sampling.prompt_logprobs >= 0 and handle is None and len(ids) == num_prompt
    return ActiveSequence(
        key=job.key,
        serial=serial,
        is_prefill=isinstance(job, PrefillJob),
        handle=handle,
        ids=ids,
        num_prompt=num_prompt,
        num_given=len(ids),
        sampling=job.sampling,
        limits=limits,
        seed=seed_of(limits.model_digest, job.cache_salt),
        text=text,
        carry=carry,
        submitted_at=now,
        reported_at=now,
        stage=Stage.COMPILING if job.sampling.grammar else Stage.WAITING,
        prompt_logprobs=[None] if is_scored else None,
    )


def _checked_ids(prompt: Sequence[int], output: Sequence[int], limits: ModelLimits) -> "array[int]":
    try:
        ids = array("I", prompt)
        ids.extend(array("I", output))
    except (OverflowError, TypeError, ValueError) as error:
        raise SequenceRefused("invalid_request", f"token ids: {error}") from None
    if not len(prompt):
        raise SequenceRefused("invalid_request", "the prompt has no tokens")
    if max(ids) >= limits.vocab_size:
        raise SequenceRefused(
            "invalid_request", f"token id {max(ids)}: the vocabulary has {limits.vocab_size}"
        )
    if len(prompt) >= limits.max_context or len(ids) > limits.max_context:
        raise SequenceRefused(
            "context_length",
            f"{len(ids)} tokens of prompt and output; this worker holds {limits.max_context}",
        )
    return ids


def _check_sampling(sampling: Sampling, limits: ModelLimits) -> None:
    """What would make the model's numbers senseless. Routers have looked at ranges and counts."""
    numbers = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise SequenceRefused("invalid_request", f"{name} is {number}")
    if sampling.repetition_penalty <= 0:
        raise SequenceRefused("invalid_request", "repetition_penalty must be above 0")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < limits.vocab_size or not math.isfinite(bias):
            raise SequenceRefused(
                "invalid_request",
                f"logit_bias: {bias} for id {token}; the vocabulary has {limits.vocab_size}",
            )


def _resumed_text(job: PrefillJob | DecodeJob, tokenizer: Tokenizer) -> tuple[OutputText, str]:
    sampling = job.sampling
    text = OutputText(
        tokenizer,
        sampling.stop,
        include_stop=sampling.include_stop,
        skip_special_tokens=sampling.skip_special_tokens,
        min_tokens=sampling.min_tokens,
    )
    try:
        return text, text.resume(job.output_ids, job.chars_sent).text
    except ResumeError as error:
        raise SequenceRefused("invalid_request", str(error)) from None

"""One job at vLLM: what is asked, what its answer means, and how it is told.

A prefill leg lends, a decode leg streams. The choice's text, stops and end are those of
`sequences`, as for Baton's own engines: vLLM only computes ids. It knows no loop of its own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.out import Delta, FailureCode, Finish, TokenLogprob
from worker.engine.base import DecodeJob, DecodingInfo, PrefillJob, PrefillResult
from worker.engine.runner import Scores
from worker.engine.sequences import ActiveSequence, SequenceRefused
from worker.engine.vllm.client import Fault, VllmClient, VllmError
from worker.engine.vllm.handles import check_handle, make_handle
from worker.engine.vllm.wire import (
    REMOTE_DECODE,
    Answer,
    Choice,
    Unmappable,
    WireError,
    decode_body,
    prefill_body,
    prompt_logprobs,
    token_logprobs,
)

_CODES: Final[dict[Fault, FailureCode]] = {
    "request": "invalid_request",
    "context": "context_length",
    "server": "engine",
    "gone": "engine",
    "silent": "engine",
}
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")
_MAX_ID_CHARS: Final = 120


@dataclass(frozen=True, slots=True)
class Site:
    """Where legs run."""

    client: VllmClient
    model: str
    worker: str
    incarnation: str
    lease_s: float
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    new_id: Callable[[], str]


class Told(Protocol):
    """Where legs say what happened."""

    def prefilled(self, key: JobKey, result: PrefillResult) -> None: ...

    def decoding(self, key: JobKey, info: DecodingInfo) -> None: ...

    def delta(self, key: JobKey, delta: Delta) -> None: ...


async def prefill(site: Site, job: PrefillJob, sequence: ActiveSequence, told: Told) -> None:
    """Compute and lend. Raises SequenceRefused, VllmError."""
    key = job.key
    end = sequence.end_of_given()
    if end is not None:
        told.prefilled(key, PrefillResult(sequence.num_prompt, 0, end, None))
        return
    body = prefill_body(site.model, sequence.ids, cache_salt=job.cache_salt)
    body["kv_transfer_params"] = dict(REMOTE_DECODE)
    # what the decode side would refuse is refused before anything is computed
    _decode_body(site, job, sequence)
    scores = _ask_scores(body, sequence)
    started_at = site.clock()
    answer = await site.client.complete(body, request_id(job))
    params = answer.kv_transfer_params
    if not params or not params.get("do_remote_prefill"):
        raise VllmError("server", "vLLM lends no blocks: was it started with a KV connector?")
    handle = make_handle(
        sequence,
        params,
        handle_id=site.new_id(),
        worker=site.worker,
        incarnation=site.incarnation,
        lease_s=site.lease_s,
        wall=site.wall_clock(),
    )
    cached = params.get("remote_prefill_cached_tokens")
    result = PrefillResult(
        prompt_tokens=sequence.num_prompt,
        cached_tokens=min(cached, sequence.num_prompt) if isinstance(cached, int) else 0,
        first=None,
        handle=handle,
        prefill_s=site.clock() - started_at,
        prompt_logprobs=_read_scores(answer.choices, sequence) if scores else None,
    )
    told.prefilled(key, result)


async def decode(site: Site, job: DecodeJob, sequence: ActiveSequence, told: Told) -> None:
    """Stream what comes after the given ids. Raises SequenceRefused, VllmError."""
    key, handle = job.key, job.handle
    end = sequence.end_of_given()
    if end is not None:
        told.decoding(key, DecodingInfo())
        told.delta(key, end)
        return
    body = _decode_body(site, job, sequence)
    if handle is not None:
        body["kv_transfer_params"] = check_handle(handle, sequence, wall=site.wall_clock())
    scored = None
    if sequence.prompt_logprobs is not None:
        scored = await _score(site, job, sequence)
        sequence.prompt_logprobs = None
    started_at = site.clock()
    reading = _Reading(sequence, told, lambda: _decoding(site, handle, started_at, scored))
    await site.client.stream(body, request_id(job), reading.take)
    if not reading.is_over:
        raise VllmError("server", "vLLM's stream had no end")


@dataclass(slots=True)
class _Reading:
    """A stream as far as it has come. `info`: what is told before its first token."""

    sequence: ActiveSequence
    told: Told
    info: Callable[[], DecodingInfo]
    is_begun: bool = False
    is_over: bool = False

    def take(self, chunk: Answer) -> bool:
        """Whether vLLM would go on where the choice has ended. Raises VllmError."""
        sequence = self.sequence
        for choice in chunk.choices:
            if self.is_over:
                break
            if not self.is_begun:
                self.is_begun = True
                self.told.decoding(sequence.key, self.info())
            delta = _take(sequence, choice)
            if delta is not None:
                self.told.delta(sequence.key, delta)
                self.is_over = bool(delta.finish)
                if self.is_over and not choice.finish_reason:
                    return True
        return False


def request_id(job: PrefillJob | DecodeJob) -> str:
    """vLLM's name for the leg: the choice's, for its logs, then router and attempt, as no two legs
    of a server may share one. Clients may name their requests, so choices may be equal."""
    choice = _UNSAFE.sub("-", job.choice)[:_MAX_ID_CHARS]
    return f"{choice}-{_UNSAFE.sub('-', job.key.router)}-{job.key.attempt}"


def failure(error: VllmError, *, has_handle: bool, is_decoding: bool) -> FailureCode:
    """The router's word for it. Before the first token of a pull, a failing server most likely
    failed at the pull: vLLM does not say."""
    if error.fault == "server" and has_handle and not is_decoding:
        return "transfer_failed"
    return _CODES[error.fault]


def _decode_body(
    site: Site, job: PrefillJob | DecodeJob, sequence: ActiveSequence
) -> dict[str, Any]:
    max_new = min(
        sequence.sampling.max_tokens - sequence.num_output,
        sequence.limits.max_context - len(sequence.ids),
    )
    try:
        return decode_body(
            site.model,
            sequence.ids,
            sequence.sampling,
            num_output=sequence.num_output,
            max_new=max(1, max_new),
            cache_salt=job.cache_salt,
        )
    except Unmappable as error:
        raise SequenceRefused("invalid_request", str(error)) from None


def _ask_scores(body: dict[str, Any], sequence: ActiveSequence) -> bool:
    if sequence.prompt_logprobs is None:
        return False
    body["prompt_logprobs"] = sequence.sampling.prompt_logprobs
    return True


def _read_scores(
    choices: Sequence[Choice], sequence: ActiveSequence
) -> list[TokenLogprob | None] | None:
    if not choices:
        return None
    ids = sequence.ids[: sequence.num_prompt]
    try:
        return prompt_logprobs(choices[0], ids, sequence.sampling.prompt_logprobs)
    except WireError as error:
        raise VllmError("server", str(error)) from None


async def _score(
    site: Site, job: DecodeJob, sequence: ActiveSequence
) -> list[TokenLogprob | None] | None:
    """Log-probabilities of the prompt: vLLM tells them in whole answers only."""
    body = prefill_body(site.model, sequence.ids, cache_salt=job.cache_salt)
    _ask_scores(body, sequence)
    answer = await site.client.complete(body, f"{request_id(job)}-scores")
    return _read_scores(answer.choices, sequence)


def _decoding(
    site: Site,
    handle: KvHandle | None,
    started_at: float,
    scored: list[TokenLogprob | None] | None,
) -> DecodingInfo:
    if handle is None:
        return DecodingInfo(prompt_logprobs=scored)
    # bytes are vLLM's to count; the time is that of the pull and of the first token
    return DecodingInfo(
        transport="vllm", transfer_s=site.clock() - started_at, source=handle.worker
    )


def _take(sequence: ActiveSequence, choice: Choice) -> Delta | None:
    """The chunk's ids as one delta, up to the end of the choice. Raises VllmError."""
    if choice.finish_reason in ("abort", "error"):
        raise VllmError("server", f"vLLM ended the request: {choice.finish_reason}")
    if choice.token_ids is None:  # else a version that does not know the option ends in silence
        raise VllmError("server", "vLLM sends no token ids: it does not know return_token_ids")
    try:
        scores = token_logprobs(choice, sequence.sampling.logprobs)
    except WireError as error:
        raise VllmError("server", str(error)) from None
    whole: Delta | None = None
    for token, score in zip(choice.token_ids, scores, strict=True):
        delta = sequence.take(token, None if score is None else Scores(sampled=score))
        whole = delta if whole is None else _joined(whole, delta)
        if whole.finish:
            return whole
    if choice.finish_reason and not (whole and whole.finish):
        return _ended(sequence, whole, choice)
    return whole


def _joined(first: Delta, second: Delta) -> Delta:
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs + second.logprobs
    return Delta(
        first.attempt,
        first.index,
        first.ids + second.ids,
        first.text + second.text,
        second.finish,
        second.stop,
        logprobs,
    )


def _ended(sequence: ActiveSequence, last: Delta | None, choice: Choice) -> Delta:
    """vLLM ended what we would have gone on with (an end token that only its config names)."""
    rest = sequence.text.finish()
    last = last or Delta(sequence.key.attempt, sequence.num_output, [], "")
    stop = choice.stop_reason if rest.stop is None else rest.stop
    finish: Finish = "length" if choice.finish_reason == "length" and rest.stop is None else "stop"
    text = sequence.carry + last.text + rest.text
    sequence.carry = ""
    return Delta(
        last.attempt,
        last.index,
        last.ids,
        text,
        finish,
        stop,
        last.logprobs,
    )

"""What the service is told of a sequence, noted among a turn's outputs.

It decides nothing: when something is said, the core decides.
"""

from collections.abc import Iterable

from protocol.handoff import KvHandle
from protocol.out import Delta, FailureCode, Leg
from worker.engine.base import DecodingInfo, EngineError, PrefillResult
from worker.engine.outputs import TurnOutputs
from worker.engine.pulling import PROGRESS_S
from worker.engine.sequences import ActiveSequence


def decoding(outputs: TurnOutputs, sequence: ActiveSequence, info: DecodingInfo) -> None:
    """Its KV is here: tokens follow."""
    key = sequence.key
    sequence.told_decoding = True
    outputs.note(key, sequence.serial, lambda outlet: outlet.decoding(key, info))


def computed(outputs: TurnOutputs, sequence: ActiveSequence) -> None:
    """As `decoding`, where this worker has computed the KV itself."""
    logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    info = DecodingInfo(cached_tokens=_cached_prompt(sequence), prompt_logprobs=logprobs)
    decoding(outputs, sequence, info)


def prefilled(
    outputs: TurnOutputs,
    sequence: ActiveSequence,
    first: Delta | None,
    handle: KvHandle | None,
    now: float,
) -> None:
    """The outcome of a prefill leg."""
    key = sequence.key
    started_at = now if sequence.started_at is None else sequence.started_at
    result = PrefillResult(
        prompt_tokens=sequence.num_prompt,
        cached_tokens=_cached_prompt(sequence),
        first=first,
        handle=handle,
        queue_s=started_at - sequence.submitted_at,
        prefill_s=now - started_at,
        prompt_logprobs=sequence.prompt_logprobs,
    )
    outputs.note(key, sequence.serial, lambda outlet: outlet.prefilled(key, result), ends=True)


def progress(
    outputs: TurnOutputs, sequence: ActiveSequence, leg: Leg, done: int, total: int, now: float
) -> None:
    """It moves on; told now and then."""
    if now - sequence.reported_at < PROGRESS_S:
        return
    sequence.reported_at = now
    key = sequence.key
    outputs.note(key, sequence.serial, lambda outlet: outlet.progress(key, leg, done, total))


def waiting(outputs: TurnOutputs, standing: Iterable[ActiveSequence], now: float) -> None:
    """These wait for a place, blocks or a lease, and are not forgotten: the thread that would serve
    them turns, and those before them have deadlines of their own."""
    for sequence in standing:
        progress(outputs, sequence, sequence.runs, 0, 0, now)


def failed(outputs: TurnOutputs, sequence: ActiveSequence, code: FailureCode, message: str) -> None:
    """The attempt is over, without an outcome."""
    key, error = sequence.key, EngineError(sequence.leg, code, message)
    outputs.note(key, sequence.serial, lambda outlet: outlet.failed(key, error), ends=True)


def _cached_prompt(sequence: ActiveSequence) -> int:
    return min(sequence.cached_tokens, sequence.num_prompt)

"""What a worker says to one router: mailbox `out.<router>.<worker>`.

Envelopes are numbered per (worker incarnation, router): a gap in `seq` means something was lost,
and the router asks for a replay of the attempts it still holds on that worker.
"""

from typing import Literal

import msgspec

from protocol.handoff import KvHandle

Finish = Literal["", "stop", "length"]
"""Empty while the choice goes on."""

Leg = Literal["prefill", "transfer", "decode"]

FailureCode = Literal[
    "unknown_attempt",  # the worker does not have this attempt (any more)
    "lease_lost",  # the source no longer held the blocks when the last byte was read
    "transfer_failed",  # the pull ended in an error or made no progress
    "handle_mismatch",  # the handle is of another prompt, model or layout
    "context_length",  # prompt and output do not fit this worker at all
    "invalid_request",  # the engine will never accept this request
    "aborted",  # the worker stopped it (drain deadline, router silent)
    "engine",  # the engine failed; others may succeed
]


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How likely the model held one token to be, and which it held likelier."""

    logprob: float
    """Natural logarithm, of the model's own distribution."""
    top: list[tuple[int, float]] = []
    """(id, logprob) of the likeliest tokens, the likeliest first; as many as were asked for."""


class Delta(msgspec.Struct, array_like=True, gc=False):
    """New output of one attempt. Never split or merged once sent: a replay repeats it as it was."""

    attempt: int
    index: int
    """Output index of `ids[0]`: what is below the receiver's count is a repeat."""
    ids: list[int]
    text: str
    """Text released by these tokens; lags behind the ids while a character or stop is open."""
    finish: Finish = ""
    stop: str | int | None = None
    """The stop string or token id that ended it."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `ids`, if the choice asked for them."""


class Accepted(msgspec.Struct, tag="a", array_like=True, frozen=True):
    """The job is queued or running. Sent only when its outcome is not immediate."""

    attempt: int
    handle: KvHandle | None = None


class Refused(msgspec.Struct, tag="r", array_like=True, frozen=True):
    """The worker takes no such work now (draining, full, wrong role); nobody's fault."""

    attempt: int
    reason: str


class Progress(msgspec.Struct, tag="g", array_like=True, frozen=True):
    """Prefilled tokens or pulled bytes moved on; at most two a second for each attempt. Nothing of
    nothing: it waits for its turn in a worker that works."""

    attempt: int
    leg: Leg
    done: int
    total: int


class Prefilled(msgspec.Struct, tag="p", array_like=True, frozen=True):
    """The prefill leg's outcome: usage, the first token, and the handle unless it ends here."""

    attempt: int
    prompt_tokens: int
    cached_tokens: int
    first: Delta | None = None
    """None where the engine's decode side recomputes the first token."""
    handle: KvHandle | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each prompt token, if asked for; the first has none."""


class Decoding(msgspec.Struct, tag="d", array_like=True, frozen=True):
    """KV is here and checked (pulled or computed); tokens follow."""

    attempt: int
    cached_tokens: int = 0
    """Prompt tokens this worker did not have to compute, where it prefilled for itself."""
    transport: str = ""
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """As in `Prefilled`, where this worker prefilled for itself."""
    source: str = ""
    """The worker the KV was pulled from."""
    transport_reason: str = ""
    """Why that transport and no other, for people."""


class StepFrame(msgspec.Struct, tag="f", array_like=True, gc=False):
    """One engine step's deltas of all streams of this router."""

    deltas: list[Delta]


class Failed(msgspec.Struct, tag="x", array_like=True, frozen=True):
    """The attempt ended without an outcome here."""

    attempt: int
    leg: Leg
    code: FailureCode
    message: str


Out = Accepted | Refused | Progress | Prefilled | Decoding | StepFrame | Failed


class OutEnvelope(msgspec.Struct, array_like=True):
    """All that one turn of a worker's loop has to say to one router."""

    worker: str
    incarnation: str
    seq: int
    outs: list[Out]

"""What the scheduler wants done. Imperatives; the driver runs them in order and never decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from protocol.errors import Outcome
from protocol.handoff import KvHandle

Cause = str
"""A few words joined by `_`: the metric label that says why."""

EndLeg = Literal["queue", "prefill", "transfer", "decode", "request"]


class StartPrefill(Struct, frozen=True, gc=False):
    """Send a prefill job; prompt, sampling and output so far are the driver's."""

    attempt: int
    choice: str
    worker: str
    incarnation: str


class StartDecode(Struct, frozen=True, gc=False):
    """Send a decode job; without a handle the worker prefills for itself."""

    attempt: int
    choice: str
    worker: str
    incarnation: str
    handle: KvHandle | None


class CancelAttempt(Struct, frozen=True, gc=False):
    """Tell the worker to stop; from now on nothing of this attempt changes anything."""

    attempt: int
    worker: str
    incarnation: str


class ForgetAttempt(Struct, frozen=True, gc=False):
    """Its outcome has arrived: the worker may forget it (`Done`), and so may the driver."""

    attempt: int
    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Ask the same worker for the attempt's state and its tokens from where the stream is."""

    attempt: int
    worker: str
    incarnation: str
    cause: Cause = field(default="", compare=False)
    """For people: it changes nothing that is done."""


class RenewHandles(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str
    handle_ids: Sequence[str]


class ReleaseHandle(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str
    handle_id: str


class AskKvSnapshot(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str


class EndChoice(Struct, frozen=True, gc=False):
    """The choice ends, exactly once. `completed` follows an `Ended` or `Prefilled(ended=True)`."""

    choice: str
    outcome: Outcome
    leg: EndLeg
    code: str
    """OpenAI error code (`router.outcomes` maps it to a status); empty if completed."""
    message: str = ""
    retry_after_s: int | None = None


class Note(Struct, frozen=True, gc=False):
    """Something worth counting and one log line, by its kind and cause."""

    kind: Literal[
        "replay",
        "retry",
        "resume",
        "local_prefill",
        "suspected",
        "live",
        "silent",
        "gone",
        "removed",
        "late",
        "paused",
    ]
    cause: Cause
    worker: str = ""
    choice: str = ""


Command = (
    StartPrefill
    | StartDecode
    | CancelAttempt
    | ForgetAttempt
    | AskReplay
    | RenewHandles
    | ReleaseHandle
    | AskKvSnapshot
    | EndChoice
    | Note
)

"""What happens to the scheduler. Nouns and past participles: facts, never wishes."""

from collections.abc import Sequence

from msgspec import Struct

from protocol.events import KvEvent, LoadReport
from protocol.handoff import KvHandle
from protocol.out import FailureCode, Leg
from protocol.worker_info import WorkerInfo


class Submitted(Struct, frozen=True, gc=False):
    """A client wants one choice."""

    choice: str
    model: str
    packed_prompt: bytes
    """Packed prompt ids; empty for an external engine's body prompt."""
    num_prompt_tokens: int
    """Counted, or estimated for a body prompt."""
    max_tokens: int
    cache_salt: str = ""
    model_digest: str = ""
    """Non-empty: only workers of this digest may serve it (its prompt was tokenized with that
    model's assets)."""
    resumable: bool = True
    siblings: str = ""
    """Non-empty: choices with the same value have the same prompt, and should share one prefill."""


class ClientGone(Struct, frozen=True, gc=False):
    """Nobody waits for this choice any more."""

    choice: str


class Accepted(Struct, frozen=True, gc=False):
    attempt: int
    handle: KvHandle | None = None


class Refused(Struct, frozen=True, gc=False):
    attempt: int
    reason: str


class Progressed(Struct, frozen=True, gc=False):
    """Prefilled tokens or pulled bytes of this attempt moved on."""

    attempt: int


class Prefilled(Struct, frozen=True, gc=False):
    """The prefill leg is over. `ended`: the first token already ended the choice."""

    attempt: int
    handle: KvHandle | None
    ended: bool
    cached_tokens: int = 0


class DecodingStarted(Struct, frozen=True, gc=False):
    """KV is on the decode worker and checked."""

    attempt: int


class Ended(Struct, frozen=True, gc=False):
    """The attempt's final delta has been delivered to the stream."""

    attempt: int


class AttemptFailed(Struct, frozen=True, gc=False):
    attempt: int
    leg: Leg
    code: FailureCode
    message: str


class GapSeen(Struct, frozen=True, gc=False):
    """Something this worker said was lost: ask again for all that it holds."""

    worker: str
    incarnation: str


class WorkerListed(Struct, frozen=True, gc=False):
    """Discovery says the worker exists (joined or updated)."""

    info: WorkerInfo


class WorkerUnlisted(Struct, frozen=True, gc=False):
    """Discovery says the key has vanished."""

    worker: str
    incarnation: str


class WorkerReported(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str
    report: LoadReport


class WorkerLeaving(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str


class WorkerUnreachable(Struct, frozen=True, gc=False):
    """The bus says nobody listens on the worker's jobs."""

    worker: str
    incarnation: str


class KvChanged(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str
    first_id: int
    events: Sequence[KvEvent]


class KvSnapshotArrived(Struct, frozen=True, gc=False):
    worker: str
    incarnation: str
    last_id: int
    hashes: Sequence[bytes]


class BusUp(Struct, frozen=True, gc=False):
    pass


class BusDown(Struct, frozen=True, gc=False):
    """Our own bus is away: silence means nothing until it is back."""


class Paused(Struct, frozen=True, gc=False):
    """Our own loop stood still: what was said meanwhile is still to be read, so that silence means
    nothing."""

    seconds: float
    """At most what has passed since the event before."""


class Ticked(Struct, frozen=True, gc=False):
    """`next_deadline()` has passed."""


Event = (
    Submitted
    | ClientGone
    | Accepted
    | Refused
    | Progressed
    | Prefilled
    | DecodingStarted
    | Ended
    | AttemptFailed
    | GapSeen
    | WorkerListed
    | WorkerUnlisted
    | WorkerReported
    | WorkerLeaving
    | WorkerUnreachable
    | KvChanged
    | KvSnapshotArrived
    | BusUp
    | BusDown
    | Paused
    | Ticked
)

"""What happens to the scheduler. Nouns and past participles: facts, never wishes."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.events import KvEvent, LoadReport
from protocol.handoff import KvHandle
from protocol.out import FailureCode, Leg
from protocol.worker_info import WorkerInfo


@dataclass(frozen=True, slots=True)
class Submitted:
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


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody waits for this choice any more."""

    choice: str


@dataclass(frozen=True, slots=True)
class Accepted:
    attempt: int
    handle: KvHandle | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Progressed:
    """Prefilled tokens or pulled bytes of this attempt moved on."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prefill leg is over. `ended`: the first token already ended the choice."""

    attempt: int
    handle: KvHandle | None
    ended: bool
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DecodingStarted:
    """KV is on the decode worker and checked."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt's final delta has been delivered to the stream."""

    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    attempt: int
    leg: Leg
    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True)
class GapSeen:
    """Something this worker said was lost: ask again for all that it holds."""

    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerListed:
    """Discovery says the worker exists (joined or updated)."""

    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerUnlisted:
    """Discovery says the key has vanished."""

    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerReported:
    worker: str
    incarnation: str
    report: LoadReport


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerUnreachable:
    """The bus says nobody listens on the worker's jobs."""

    worker: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class KvChanged:
    worker: str
    incarnation: str
    first_id: int
    events: Sequence[KvEvent]


@dataclass(frozen=True, slots=True)
class KvSnapshotArrived:
    worker: str
    incarnation: str
    last_id: int
    hashes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class BusUp:
    pass


@dataclass(frozen=True, slots=True)
class BusDown:
    """Our own bus is away: silence means nothing until it is back."""


@dataclass(frozen=True, slots=True)
class Ticked:
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
    | Ticked
)

"""The engine port: what the service asks of an engine, and what an engine tells the service.

An engine owns its KV, its batches and its clock; the service owns mailboxes and what routers may
ask again. Everything here is called on the event loop and returns at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from protocol.events import KvEvent
from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.jobs import Body
from protocol.out import Delta, FailureCode, Leg, TokenLogprob
from protocol.sampling import Sampling
from protocol.worker_info import Capacity, EngineTraits, KvLayout
from text.assets import ModelAssets


class PrefillJob(msgspec.Struct, frozen=True):
    """Compute KV of prompt + output, sample the next token, lend the blocks."""

    key: JobKey
    choice: str
    prompt: Sequence[int] | Body
    sampling: Sampling
    output_ids: Sequence[int] = ()
    chars_sent: int = 0
    cache_salt: str = ""


class DecodeJob(msgspec.Struct, frozen=True):
    """Go on after `output_ids`; without a handle it is a local prefill or a resume."""

    key: JobKey
    choice: str
    prompt: Sequence[int] | Body
    sampling: Sampling
    handle: KvHandle | None = None
    output_ids: Sequence[int] = ()
    chars_sent: int = 0
    cache_salt: str = ""


class PrefillResult(msgspec.Struct, frozen=True):
    """Outcome of a prefill leg. `first.finish` set: the choice ends here and nothing is lent."""

    prompt_tokens: int
    cached_tokens: int
    first: Delta | None
    handle: KvHandle | None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None


class DecodingInfo(msgspec.Struct, frozen=True):
    """How the KV of a decode leg came here."""

    cached_tokens: int = 0
    transport: str = ""
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    source: str = ""
    """The worker it was pulled from."""
    transport_reason: str = ""
    """Why that transport and no other."""


class EngineError(msgspec.Struct, frozen=True):
    leg: Leg
    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is, known once it has started."""

    engine: str
    model_digest: str
    layout: KvLayout
    capacity: Capacity
    traits: EngineTraits
    assets: ModelAssets | None
    transports: tuple[str, ...] = ()
    """Those that run, best first."""
    transport_reasons: Mapping[str, str] = field(default_factory=dict)
    """Of every known transport: why it runs, or why not."""
    model_name: str = ""
    """What an external engine calls it: the served name, where the operator gave none."""


class Load(msgspec.Struct, frozen=True):
    """Numbers of one moment."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    """Free or evictable: what a new sequence could get."""
    cached_blocks: int
    lent_blocks: int
    quarantined_blocks: int
    steps: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The prefix cache after KV event `last_id`."""

    last_id: int
    hashes: list[bytes]


@dataclass(slots=True)
class EngineStats:
    """Counters an engine keeps for `/metrics`; read, never reset, by the service."""

    leases_ended: dict[str, int] = field(default_factory=dict)
    """By end: released, revoked, expired."""
    transfers: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (transport, result)."""
    transfer_bytes: dict[str, int] = field(default_factory=dict)
    """Pulled bytes by transport."""
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By source worker: the transport its KV comes over, and why that one. Bounded."""
    preemptions: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0


class Outlet(Protocol):
    """What the service hears. Called on the loop, batched per engine step."""

    def accepted(self, key: JobKey, handle: KvHandle | None) -> None: ...

    def progress(self, key: JobKey, leg: Leg, done: int, total: int) -> None: ...

    def prefilled(self, key: JobKey, result: PrefillResult) -> None: ...

    def decoding(self, key: JobKey, info: DecodingInfo) -> None:
        """KV is here and checked."""

    def step(self, deltas: Sequence[tuple[JobKey, Delta]]) -> None:
        """One engine step's output, for all routers; a delta with `finish` ends its attempt."""

    def failed(self, key: JobKey, error: EngineError) -> None: ...

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None: ...

    def unhealthy(self, reason: str) -> None:
        """The engine must not go on (quarantine over its bound, step crashed): exit at once."""


class Engine(Protocol):
    async def start(self, outlet: Outlet) -> EngineInfo:
        """Load and be ready. Raises ConfigError with one clear line."""

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        """Never waits; the outcome reaches the outlet."""

    def cancel(self, key: JobKey) -> None:
        """Stop it wherever it is; unknown keys are ignored. Nothing more is heard of `key`."""

    def renew(self, handle_ids: Sequence[str]) -> None: ...

    def release(self, handle_ids: Sequence[str]) -> None: ...

    def load(self) -> Load: ...

    def stats(self) -> EngineStats: ...

    def kv_snapshot(self) -> Snapshot: ...

    async def drain(self) -> None:
        """Returns when nothing runs and no handle is lent. Cancellable."""

    async def stop(self) -> bool:
        """Stop now. False if a transfer is still live: the process must end by `os._exit`."""

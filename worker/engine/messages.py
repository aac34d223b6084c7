"""What the thread of a stepped engine is told, and what its operator decides.

Values only. It knows neither the thread nor what the messages do.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from protocol.ids import JobKey
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.grammar import GrammarState
from worker.handoff.ends import TransferEnd


@dataclass(frozen=True, slots=True)
class StepperConfig:
    """What an operator or `main` decides for a stepped engine."""

    worker: str
    incarnation: str
    engine: str = "simulated"
    """The name it goes by in discovery."""
    max_running: int = 64
    """Sequences in one step; those whose KV is on the way count."""
    max_step_tokens: int = 512
    """Tokens in one step: long prompts are computed in chunks, so that others decode meanwhile."""
    lease_s: float = 30.0
    transfer_timeout_s: float = 60.0
    """A pull may be silent for this long."""
    max_tokens_in_flight: int | None = None
    """Bound on the tokens of all running pulls; None: no bound."""
    max_quarantined_blocks: int | None = None
    """Beyond it the engine is unhealthy; None: half of all blocks."""
    transport_reasons: Mapping[str, str] = field(default_factory=dict)
    """Of every known transport: why it runs, or why not."""
    stop_timeout_s: float = 5.0
    validate: bool = False
    """Look at every rule after every turn and before every write: slow, for tests."""


class Submit(msgspec.Struct, frozen=True):
    job: PrefillJob | DecodeJob
    serial: int


class Cancel(msgspec.Struct, frozen=True):
    key: JobKey


class Renew(msgspec.Struct, frozen=True):
    handle_ids: tuple[str, ...]


class Release(msgspec.Struct, frozen=True):
    handle_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Set `event` (on the loop) when nothing runs and nothing is lent; `wanted` false: no more."""

    event: asyncio.Event
    wanted: bool = True


class OperationEnded(msgspec.Struct, frozen=True):
    """From a transport's thread: an operation of a pull is terminal."""

    pull_id: int
    is_word: bool
    end: TransferEnd


@dataclass(frozen=True, slots=True)
class GrammarMade:
    """From a thread that compiles: the grammar of an attempt, or why there is none (one line)."""

    key: JobKey
    serial: int
    result: GrammarState | str


Message = Submit | Cancel | Renew | Release | Drain | OperationEnded | GrammarMade

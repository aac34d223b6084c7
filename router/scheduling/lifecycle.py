"""The life of a choice: one table, and the records it moves.

Theory. A *choice* is what the client waits for. It lives in exactly one state:

- `queued`: no worker has it. Retries and resumes come back here, ahead of new work.
- `prefilling`: a prefill attempt is out; its worker is charged tokens to compute and blocks.
- `decode_wait`: a handle is held, the blocks are lent by the prefill worker, no decode worker is
  chosen. Engines that need both legs at once hand the handle over while they still prefill.
- `transferring`: a decode attempt is out and pulls; two workers are charged.
- `local`: a decode worker prefills for itself; no handle exists.
- `decoding`: KV is on the decode worker and checked; the handle has been released.
- `ended`: the client has been told. Nothing leads out of it, so a choice ends exactly once.

An *attempt* is one dispatch to one incarnation. What carries the number of an attempt that is not
open any more is late and moves nothing. Whatever breaks ends attempts and moves the choice back
along `rewait` (the handle is good: another decode worker pulls it) or `requeue` (prefill again).

Every change of state goes through `Choice.move`; a move that the table does not have is our own
bug and raises with the story. This file decides nothing and knows no clock.
"""

from typing import Final, Literal

from msgspec import Struct

from protocol.blocks import seed_of
from protocol.errors import LocalError
from protocol.handoff import KvHandle
from router.scheduling.attempts import Tries
from router.scheduling.commands import EndLeg
from router.scheduling.deadlines import Timer
from router.scheduling.events import Submitted
from router.scheduling.fleet import Reservation, Worker
from router.scheduling.pools import Group
from router.scheduling.prefix_index import PromptHashes

State = Literal["queued", "prefilling", "decode_wait", "transferring", "local", "decoding", "ended"]
Move = Literal[
    "start_prefill", "start_local", "start_pull", "lend", "decode", "rewait", "requeue", "end"
]

TABLE: Final[dict[tuple[State, Move], State]] = {
    ("queued", "start_prefill"): "prefilling",
    ("queued", "start_local"): "local",
    ("queued", "end"): "ended",
    ("prefilling", "lend"): "decode_wait",
    ("prefilling", "requeue"): "queued",
    ("prefilling", "end"): "ended",
    ("decode_wait", "start_pull"): "transferring",
    ("decode_wait", "requeue"): "queued",
    ("decode_wait", "end"): "ended",
    ("transferring", "decode"): "decoding",
    ("transferring", "rewait"): "decode_wait",
    ("transferring", "requeue"): "queued",
    ("transferring", "end"): "ended",
    ("local", "decode"): "decoding",
    ("local", "requeue"): "queued",
    ("local", "end"): "ended",
    ("decoding", "requeue"): "queued",
    ("decoding", "end"): "ended",
}

LEG_OF: Final[dict[State, EndLeg]] = {
    "queued": "queue",
    "prefilling": "prefill",
    "decode_wait": "transfer",
    "transferring": "transfer",
    "local": "prefill",
    "decoding": "decode",
}
"""The leg that a choice is said to have ended in."""

STORY_LINES: Final = 64
STORY_LEGS: Final = 16
"""A stream that makes progress may move for ever: the latest legs are remembered."""
_MAX_GROUPS: Final = 4

EXPECTED_OUTPUT: Final = 256
"""Tokens of output that a decode worker is charged for, where more are allowed."""

Story = list[tuple[float, str, str]]
AttemptKind = Literal["prefill", "pull", "local"]
Phase = Literal["sent", "accepted", "decoding"]


class LegTrace(Struct, eq=False, gc=False):
    """What people are told of one attempt. Times are the caller's `now`; 0 where it never was."""

    attempt: int
    kind: AttemptKind
    worker: str
    incarnation: str
    sent_at: float
    accepted_at: float = 0.0
    decoding_at: float = 0.0
    ended_at: float = 0.0
    answered: bool = False
    """Its worker said how it ended; else we stopped it."""
    cause: str = ""
    """Why it ended without an outcome."""


class Attempt:
    """One dispatch to one incarnation. Times are bus time, which stands still in an outage."""

    __slots__ = (
        "asked", "blameless", "choice", "id", "idle_signs", "kind", "output_seen", "patience",
        "phase", "reservation", "sign", "started", "timer", "trace", "worker",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        choice: "Choice",
        kind: AttemptKind,
        reservation: Reservation,
        at: float,
        now: float,
    ) -> None:
        self.id = number
        self.choice = choice
        self.kind: AttemptKind = kind
        self.reservation = reservation
        self.worker: Worker = reservation.worker
        self.phase: Phase = "sent"
        self.started = at
        self.sign = at
        """When anything of it was last heard."""
        self.asked: float | None = None
        """When a replay was asked for that is still unanswered."""
        self.output_seen = -1
        self.idle_signs = 0
        """Words since the output last grew."""
        self.patience = 0
        """How often more a replay is asked for before the work moves."""
        self.blameless = False
        """The bus lost it, so the worker is not excluded when it moves."""
        self.timer = Timer("attempt", self)
        worker = reservation.worker
        self.trace = LegTrace(number, kind, worker.id, worker.incarnation, now)
        choice.legs.append(self.trace)
        if len(choice.legs) > STORY_LEGS:
            del choice.legs[0]


class Lent:
    """A handle that a choice holds; `reservation` is the lender's."""

    __slots__ = ("choice", "decode_blocks", "expires_at", "failures", "handle", "reservation")

    def __init__(self, choice: "Choice", handle: KvHandle, reservation: Reservation) -> None:
        self.choice = choice
        self.decode_blocks = choice.pending_blocks
        """What a decode worker will be charged for it."""
        self.handle = handle
        self.reservation = reservation
        self.failures = 0
        """Decode workers that could not pull it."""
        self.expires_at: float | None = None
        """From then on nobody may begin to pull it; None where it is renewed."""

    @property
    def is_doubtful(self) -> bool:
        """Its lender is silent, gone or unheard: who could not pull it has not failed. (Suspected
        is not enough: it may be so because of the pulls, and then it may be the wire.)"""
        lender = self.reservation.worker
        return lender.dead or not lender.live or lender.unreachable_at is not None


class Choice:
    """What one client waits for."""

    __slots__ = (
        "backoff", "decode", "group", "hashes", "id", "legs", "lent", "pending_blocks", "prefill",
        "request_timer", "retrying", "spec", "state", "story", "timer", "tries",
    )  # fmt: skip

    def __init__(self, spec: Submitted, now: float) -> None:
        self.id = spec.choice
        self.spec = spec
        self.state: State = "queued"
        self.story: Story = [(now, "submitted", "")]
        self.legs: list[LegTrace] = []
        """Every attempt, the latest last."""
        self.prefill: Attempt | None = None
        """Not None iff a prefill attempt is open."""
        self.decode: Attempt | None = None
        """Not None iff state in transferring, local, decoding."""
        self.lent: Lent | None = None
        """Not None iff a handle is held: state in decode_wait, transferring."""
        self.group: Group | None = None
        """Whose decode places it waits for: from the prefill's start to the pull's."""
        self.pending_blocks = 0
        self.retrying = False
        """Its next start is a second one: it comes out of the budget, ahead of new work."""
        self.tries = Tries()
        self.hashes: dict[Group, PromptHashes] = {}
        self.timer = Timer("wait", self)
        """Of the queue, or of the wait for a decode place."""
        self.backoff: Timer | None = None
        self.request_timer: Timer | None = None

    def move(self, move: Move, now: float, detail: str = "") -> None:
        """Raises LocalError, with nothing changed, if the table has no such move."""
        state = TABLE.get((self.state, move))
        if state is None:
            raise LocalError(f"choice {self.id}: {move} while {self.state}; {list(self.story)}")
        self.state = state
        self.tell(now, move, detail)

    def tell(self, now: float, what: str, detail: str) -> None:
        """A line of its story; the oldest goes. (A list: a deque takes a page of memory each.)"""
        story = self.story
        story.append((now, what, detail))
        if len(story) > STORY_LINES:
            del story[0]

    def hashes_for(self, group: Group) -> PromptHashes:
        """Block hashes of the prompt as this group's workers compute them."""
        hashes = self.hashes.get(group)
        if hashes is None:
            seed = seed_of(group.digest, self.spec.cache_salt)
            hashes = PromptHashes(self.spec.packed_prompt, group.block_size, seed)
            if len(self.hashes) >= _MAX_GROUPS:
                self.hashes.clear()
            self.hashes[group] = hashes
        return hashes

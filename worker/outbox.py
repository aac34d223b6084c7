"""What this worker has said about each attempt, kept until the router has it.

Core messaging loses messages, so every outcome can be asked for again: an attempt's record holds
its outcome and its deltas exactly as they were sent. A record lives until the router's `Done` or
`Cancel`, or `linger_s` after the attempt has ended, or until the bound on records pushes the oldest
ended out. Knows routers and attempts, not engines; time is an argument.

What was told of an attempt, and what may still be told:

    state      on                                        next
    TAKEN      accept (nothing better came soon)         ACCEPTED
               lend (a handle, while it still computes)  ACCEPTED
               begin (decoding)                          WORKING
               tokens                                    WORKING
               end (prefilled, failed, the last token)   ENDED
    ACCEPTED   lend                                      ACCEPTED
               begin, tokens                             WORKING
               end                                       ENDED
    WORKING    begin, tokens                             WORKING
               end                                       ENDED
    ENDED      nothing

What has no row comes too late and is not said. So nothing follows an end, and an attempt ends once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from protocol.ids import JobKey
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Leg,
    Out,
    Prefilled,
    Progress,
    StepFrame,
)

PROGRESS_S: Final = 0.5
"""An attempt's progress is told this often at most."""

Post = Callable[[str, Out], None]
"""(router, message): goes into that router's next envelope."""


class Told(Enum):
    """What was told of an attempt."""

    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    TAKEN = "taken"
    ACCEPTED = "accepted"
    WORKING = "working"
    ENDED = "ended"


class Say(Enum):
    """What may be told."""

    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    ACCEPT = "accept"
    LEND = "lend"
    BEGIN = "begin"
    TOKENS = "tokens"
    END = "end"


NEXT: Final[dict[tuple[Told, Say], Told]] = {
    (Told.TAKEN, Say.ACCEPT): Told.ACCEPTED,
    (Told.TAKEN, Say.LEND): Told.ACCEPTED,
    (Told.TAKEN, Say.BEGIN): Told.WORKING,
    (Told.TAKEN, Say.TOKENS): Told.WORKING,
    (Told.TAKEN, Say.END): Told.ENDED,
    (Told.ACCEPTED, Say.LEND): Told.ACCEPTED,
    (Told.ACCEPTED, Say.BEGIN): Told.WORKING,
    (Told.ACCEPTED, Say.TOKENS): Told.WORKING,
    (Told.ACCEPTED, Say.END): Told.ENDED,
    (Told.WORKING, Say.BEGIN): Told.WORKING,
    (Told.WORKING, Say.TOKENS): Told.WORKING,
    (Told.WORKING, Say.END): Told.ENDED,
}


@dataclass(slots=True)
class Record:
    """One attempt's story, as told to its router."""

    leg: Leg
    state: Told = Told.TAKEN
    accepted: Accepted | None = None
    prefilled: Prefilled | None = None
    decoding: Decoding | None = None
    failed: Failed | None = None
    deltas: list[Delta] = field(default_factory=list)
    progressed_at: float = float("-inf")

    @property
    def ended(self) -> bool:
        return self.state is Told.ENDED

    def move(self, event: Say) -> bool:
        """By the table; False if it is too late to say this."""
        after = NEXT.get((self.state, event))
        if after is None:
            return False
        self.state = after
        return True


class Outbox:
    """All records of one worker."""

    def __init__(self, post: Post, *, linger_s: float, max_ended: int = 16_384) -> None:
        self._post = post
        self._linger_s = linger_s
        self._max_ended = max_ended
        self._records: dict[JobKey, Record] = {}
        self._ended: OrderedDict[JobKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: JobKey) -> bool:
        return key in self._records

    def keys_of(self, router: str) -> list[JobKey]:
        return [key for key in self._records if key.router == router]

    @property
    def num_open(self) -> int:
        """Attempts of which the engine will say more."""
        return len(self._records) - len(self._ended)

    def is_open(self, key: JobKey) -> bool:
        """Whether the engine may still say something about it."""
        record = self._records.get(key)
        return record is not None and not record.ended

    def leg_of(self, key: JobKey) -> Leg:
        return self._records[key].leg

    def open_keys(self) -> list[JobKey]:
        return [key for key, record in self._records.items() if not record.ended]

    def open(self, key: JobKey, leg: Leg) -> None:
        self._records[key] = Record(leg)

    def accept(self, key: JobKey, message: Accepted | None = None) -> None:
        """Say that the job is here, unless something better has been said already. A handle is
        always worth saying."""
        record = self._records.get(key)
        if record is None:
            return
        has_handle = message is not None and message.handle is not None
        if record.move(Say.LEND if has_handle else Say.ACCEPT):
            record.accepted = message or Accepted(key.attempt)
            self._post(key.router, record.accepted)

    def progress(self, key: JobKey, message: Progress, now: float) -> None:
        """Never asked for again, so not kept."""
        record = self._records.get(key)
        if record is None or record.ended or now - record.progressed_at < PROGRESS_S:
            return
        record.progressed_at = now
        self._post(key.router, message)

    def prefilled(self, key: JobKey, message: Prefilled, now: float) -> bool:
        """False if nobody will hear it: what it lends is then nobody's."""
        record = self._ending(key, now)
        if record is None:
            return False
        record.prefilled = message
        self._post(key.router, message)
        return True

    def decoding(self, key: JobKey, message: Decoding) -> None:
        record = self._records.get(key)
        if record is not None and record.move(Say.BEGIN):
            record.decoding = message
            self._post(key.router, message)

    def failed(self, key: JobKey, message: Failed, now: float) -> None:
        record = self._ending(key, now)
        if record is not None:
            record.failed = message
            self._post(key.router, message)

    def step(self, deltas: Iterable[tuple[JobKey, Delta]], now: float) -> None:
        """One frame for each router that has a delta in this step."""
        frames: dict[str, list[Delta]] = {}
        records = self._records
        for key, delta in deltas:
            record = records.get(key)
            if record is None:
                continue
            # The usual case without the table: this is done for every token.
            if record.state is not Told.WORKING and not record.move(Say.TOKENS):
                continue
            record.deltas.append(delta)
            frame = frames.get(key.router)
            if frame is None:
                frame = frames[key.router] = []
            frame.append(delta)
            if delta.finish:
                self._ending(key, now)
        for router, frame in frames.items():
            self._post(router, StepFrame(frame))

    def replay(self, key: JobKey, index: int) -> None:
        """Say again what is known of `key`, its deltas from output index `index` on."""
        record = self._records.get(key)
        if record is None:
            text = "this worker does not have the attempt"
            self._post(key.router, Failed(key.attempt, "decode", "unknown_attempt", text))
            return
        if record.failed is not None:
            self._post(key.router, record.failed)
            return
        said: list[Out] = []
        if record.accepted is not None and record.accepted.handle is not None:
            said.append(record.accepted)
        said += [message for message in (record.prefilled, record.decoding) if message is not None]
        missing = [delta for delta in record.deltas if delta.index >= index]
        if missing:
            said.append(StepFrame(missing))
        for message in said or [record.accepted or Accepted(key.attempt)]:
            self._post(key.router, message)

    def forget(self, key: JobKey) -> None:
        """The router has it all, or does not want it."""
        self._records.pop(key, None)
        self._ended.pop(key, None)

    def sweep(self, now: float) -> None:
        """Forget what ended more than `linger_s` ago."""
        while self._ended:
            key, ended_at = next(iter(self._ended.items()))
            if now - ended_at < self._linger_s and len(self._ended) <= self._max_ended:
                return
            self.forget(key)

    def _ending(self, key: JobKey, now: float) -> Record | None:
        """The record, which ends now; None if there is none that could."""
        record = self._records.get(key)
        if record is None or not record.move(Say.END):
            return None
        self._ended[key] = now
        if len(self._ended) > self._max_ended:
            self.sweep(now)
        return record

"""What one turn of an engine's thread has to say, and how it is said on the loop.

A turn's outputs travel in one piece. Whatever belongs to an attempt that was cancelled meanwhile is
dropped on the loop, so that nothing is heard of a key after `cancel`. It knows no engine.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from protocol.blocks import HASH_BYTES
from protocol.events import KvCleared, KvEvent, KvRemoved, KvStored
from protocol.ids import JobKey
from protocol.out import Delta
from worker.engine.base import Outlet, Snapshot

_log: Final = logging.getLogger("baton.worker")

Say = Callable[[Outlet], None]


class TurnOutputs(msgspec.Struct):
    """Filled by the engine's thread, then handed over and never touched again."""

    taken: dict[JobKey, int] = {}
    """Attempts that were taken in this turn and have no other output in it; with their serials."""
    notes: list[tuple[JobKey, int, bool, Say]] = []
    """Attempt, serial, whether it ends here, and what to say."""
    deltas: list[tuple[JobKey, int, Delta]] = []
    first_event: int = 0
    events: list[KvEvent] = []
    drained: list[asyncio.Event] = []
    unhealthy: str = ""

    def note(self, key: JobKey, serial: int, say: Say, *, ends: bool = False) -> None:
        if self.taken:
            self.taken.pop(key, None)
        self.notes.append((key, serial, ends, say))

    def delta(self, key: JobKey, serial: int, delta: Delta) -> None:
        if self.taken:
            self.taken.pop(key, None)
        self.deltas.append((key, serial, delta))

    def __bool__(self) -> bool:
        return bool(
            self.taken or self.notes or self.deltas or self.events or self.drained or self.unhealthy
        )


class OutputDelivery:
    """The loop's side: which attempts may still be heard of, and the mirror of the prefix cache."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._open: dict[JobKey, int] = {}
        self._cached: dict[bytes, None] = {}
        self._last_event = 0
        self._closed = False

    def open(self, key: JobKey, serial: int) -> bool:
        """An attempt begins. False if it has begun and not ended."""
        if key in self._open:
            return False
        self._open[key] = serial
        return True

    @property
    def num_open(self) -> int:
        return len(self._open)

    def forget(self, key: JobKey) -> None:
        self._open.pop(key, None)

    def close(self) -> None:
        """Nothing is said any more."""
        self._closed = True
        self._open.clear()

    def snapshot(self) -> Snapshot:
        """The prefix cache after the last events that the outlet has heard of."""
        return Snapshot(self._last_event, list(self._cached))

    def deliver(self, outputs: TurnOutputs) -> None:
        """Say all of it, in the order in which it happened."""
        for event in outputs.drained:
            event.set()
        if self._closed:
            return
        for key, serial in outputs.taken.items():
            if self._open.get(key) == serial:
                self._outlet.accepted(key, None)
        self._say_notes(outputs.notes)
        if outputs.deltas:
            self._say_deltas(outputs.deltas)
        if outputs.events:
            self._say_events(outputs.first_event, outputs.events)
        if outputs.unhealthy:
            self._outlet.unhealthy(outputs.unhealthy)

    def _say_notes(self, notes: list[tuple[JobKey, int, bool, Say]]) -> None:
        for key, serial, ends, say in notes:
            if self._open.get(key) == serial:
                if ends:
                    del self._open[key]
                try:
                    say(self._outlet)
                except Exception:  # noqa: BLE001  the others of this turn are owed theirs
                    _log.exception("not told attempt=%s", key)

    def _say_deltas(self, deltas: list[tuple[JobKey, int, Delta]]) -> None:
        opened = self._open
        said = []
        for key, serial, delta in deltas:
            if opened.get(key) == serial:
                said.append((key, delta))
                if delta.finish:
                    del opened[key]
        if said:
            self._outlet.step(said)

    def _say_events(self, first: int, events: list[KvEvent]) -> None:
        for event in events:
            match event:
                case KvStored(hashes=hashes):
                    self._cached.update(dict.fromkeys(_split(hashes)))
                case KvRemoved(hashes=hashes):
                    for digest in _split(hashes):
                        self._cached.pop(digest, None)
                case KvCleared():
                    self._cached.clear()
        self._last_event = first + len(events) - 1
        self._outlet.kv_events(first, events)


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]

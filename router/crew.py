"""What the parent of several routers decides: who starts, who leaves, what is said.

Sans-IO: events and `now` in, commands out. It knows children by number and place; no process,
socket or signal. Each place has at most one child that serves, one that starts, and those that
leave:

    STARTING --ready--> SERVING --relieved or told to stop--> LEAVING --> ended

A rolling restart (`hangup`) does one place after the other: its successor starts, and once that is
ready the old child is relieved; when the old one has ended, the next place follows. A successor
that ends, or is not ready in time, ends the whole restart: who serves goes on serving.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

EXIT_CONFIG: Final = 2
"""How a child ends that cannot serve with the settings it has."""
FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0
STEADY_S: Final = 60.0
"""Who has served for so long did not fail at start: the next back-off begins anew."""


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Start:
    """A new child. `successor`: others serve, so it takes part only when it is as able as they."""

    number: int
    successor: bool


@dataclass(frozen=True, slots=True)
class Relieve:
    """To leave while others serve in its place: it stops accepting at once."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """To leave (again: at once)."""

    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    number: int


@dataclass(frozen=True, slots=True)
class Say:
    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Nobody is left: the parent ends with this code."""

    code: int


Command = Start | Relieve | Stop | Kill | Say | Leave


@dataclass(slots=True)
class _Child:
    place: int
    phase: Phase
    since: float
    leave_s: float
    deadline: float | None = None


@dataclass(slots=True)
class _Place:
    failures: int = 0
    retry_at: float | None = None


class Crew:
    """One per parent. `start_s` bounds a successor's start, `leave_s` the leaving of a child that
    has not said how long it needs, `hurry_s` that of one that was told to leave now."""

    def __init__(self, num: int, *, start_s: float, leave_s: float, hurry_s: float) -> None:
        self._start_s, self._leave_s, self._hurry_s = start_s, leave_s, hurry_s
        self._places = [_Place() for _ in range(num)]
        self._children: dict[int, _Child] = {}
        self._last = 0
        self._was_ready = False
        self._rolling: int | None = None
        self._to_roll: deque[int] = deque()
        self._again = False
        self._is_stopping = False
        self._code = 0
        self._commands: list[Command] = []

    # --- events ---

    def begin(self, now: float) -> list[Command]:
        """The first child alone: a mistake in the settings is said once."""
        self._start(0, now)
        return self._take()

    def ready(self, number: int, now: float, *, leave_s: float | None = None) -> list[Command]:
        """It serves. `leave_s`: how long it may take to leave, by its own settings."""
        child = self._children.get(number)
        if child is None or child.phase is not Phase.STARTING:
            return []
        if leave_s is not None:
            child.leave_s = leave_s
        old = self._find(child.place, Phase.SERVING)
        child.phase, child.since, child.deadline = Phase.SERVING, now, None
        if old is not None:
            self._commands.append(Relieve(old))
            self._leaves(old, now)
        else:
            self._done_with(child.place)
        if not self._was_ready:
            self._was_ready = True
            for place in range(1, len(self._places)):
                self._start(place, now)
        self._roll(now)
        return self._take()

    def ended(self, number: int, code: int, now: float) -> list[Command]:
        """A child is gone, whoever wanted it."""
        child = self._children.pop(number)
        if self._is_stopping:
            self._leave_if_empty()
        elif child.phase is Phase.STARTING:
            self._failed_to_start(child, code, now)
        elif child.phase is Phase.SERVING:
            self._say("error", f"a router ended by itself with {code}")
            if now - child.since >= STEADY_S:
                self._places[child.place].failures = 0
            self._retry_later(child.place, now)
        elif self._find(child.place, Phase.STARTING) is None:
            self._done_with(child.place)
        self._roll(now)
        return self._take()

    def hangup(self, now: float) -> list[Command]:
        """A rolling restart is asked for. During one: one more after it, however often asked."""
        if self._is_stopping:
            return []
        self._again = True
        if self._is_rolling or not self._was_ready:
            self._say("info", "rolling restart: after the present one")
        else:
            self._roll(now)
        return self._take()

    def stop(self, now: float) -> list[Command]:
        """All leave; when told again, at once."""
        again, self._is_stopping = self._is_stopping, True
        for number, child in self._children.items():
            if again or child.phase is not Phase.LEAVING:
                self._commands.append(Stop(number))
            self._leaves(number, now, self._hurry_s if again else child.leave_s)
        self._leave_if_empty()
        return self._take()

    def tick(self, now: float) -> list[Command]:
        """Whatever was due by `now`."""
        for number, child in self._children.items():
            if child.deadline is not None and now >= child.deadline:
                child.deadline = None
                what = "ready" if child.phase is Phase.STARTING else "gone"
                self._say("error", f"a router was not {what} in time: killed")
                self._commands.append(Kill(number))
        for place, state in enumerate(self._places):
            if state.retry_at is not None and now >= state.retry_at and not self._is_stopping:
                self._start(place, now)
        return self._take()

    def next_deadline(self) -> float | None:
        due = [child.deadline for child in self._children.values() if child.deadline is not None]
        if not self._is_stopping:
            due += [place.retry_at for place in self._places if place.retry_at is not None]
        return min(due, default=None)

    # --- for people and tests ---

    def phases(self) -> dict[int, Phase]:
        return {number: child.phase for number, child in self._children.items()}

    # --- decisions ---

    @property
    def _is_rolling(self) -> bool:
        return self._rolling is not None or bool(self._to_roll)

    def _start(self, place: int, now: float) -> None:
        """A successor has a bound; who comes first may wait for NATS as long as that takes."""
        self._last += 1
        self._places[place].retry_at = None
        successor = any(child.phase is Phase.SERVING for child in self._children.values())
        deadline = now + self._start_s if successor else None
        self._children[self._last] = _Child(place, Phase.STARTING, now, self._leave_s, deadline)
        self._commands.append(Start(self._last, successor))

    def _leaves(self, number: int, now: float, limit_s: float | None = None) -> None:
        child = self._children[number]
        if child.phase is Phase.LEAVING and limit_s is None:
            return
        child.phase = Phase.LEAVING
        child.deadline = now + (child.leave_s if limit_s is None else limit_s)

    def _failed_to_start(self, child: _Child, code: int, now: float) -> None:
        if not self._was_ready and code == EXIT_CONFIG:
            self._is_stopping, self._code = True, code  # it has said why
            self._leave_if_empty()
            return
        self._say("error", f"a new router ended at start with {code}")
        if self._rolling == child.place:
            self._say("error", "rolling restart given up: the others go on serving")
            self._rolling = None
            self._to_roll.clear()
        if self._find(child.place, Phase.SERVING) is None:
            self._retry_later(child.place, now)

    def _retry_later(self, place: int, now: float) -> None:
        """Unless a successor is on its way already."""
        if self._find(place, Phase.STARTING) is not None:
            return
        state = self._places[place]
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2**state.failures)
        state.failures = min(state.failures + 1, 16)
        state.retry_at = now + delay_s
        self._say("info", f"another one starts in {delay_s:g} s")

    def _roll(self, now: float) -> None:
        """The next place of a rolling restart, when the one before is done."""
        if self._is_stopping or self._rolling is not None:
            return
        if not self._to_roll and self._again and self._was_ready:
            self._again = False
            self._to_roll = deque(range(len(self._places)))
            self._say("info", f"rolling restart of {len(self._places)} routers")
        if self._to_roll:
            self._rolling = self._to_roll.popleft()
            if self._find(self._rolling, Phase.STARTING) is None:
                self._start(self._rolling, now)

    def _done_with(self, place: int) -> None:
        """Its successor serves, its old child is gone."""
        if self._rolling == place:
            self._rolling = None
            if not self._to_roll:
                self._say("info", "rolling restart done")

    def _leave_if_empty(self) -> None:
        if not self._children:
            self._commands.append(Leave(self._code))

    def _find(self, place: int, phase: Phase) -> int | None:
        for number, child in self._children.items():
            if (child.place, child.phase) == (place, phase):
                return number
        return None

    def _say(self, level: Literal["info", "warning", "error"], text: str) -> None:
        self._commands.append(Say(level, text))

    def _take(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

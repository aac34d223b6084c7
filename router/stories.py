"""The story of a request: what happened to it, choice by choice and leg by leg, for people.

Requests that run, and a ring of those that ended: bounded by their number and by what they take.
Requests that were refused before any worker had them are kept in a ring of their own, so that a
flood of bad ones does not push out those that an operator asks for. Knows the scheduler's past of
a choice, decides nothing, and is told everything: it never looks at a clock of its own.
"""

from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from msgspec import Struct

from protocol.errors import ClientError
from protocol.ids import request_of
from router.scheduling.commands import EndChoice
from router.scheduling.lifecycle import LegTrace
from router.scheduling.tables import NO_PAST, Past

MAX_ENDED: Final = 1024
"""Requests remembered: a few minutes of a busy router, all day of a quiet one."""
MAX_COST: Final = 8 << 20
"""Bytes they may take, roughly: a request of 128 choices that moved often counts for what it is."""
MAX_REFUSED: Final = 1024
MAX_CHANCES: Final = 32
MAX_TEXT: Final = 500
"""Characters kept of any one text that others wrote."""
_RECORD_COST: Final = 600
_LEG_COST: Final = 300
_LINE_COST: Final = 160


class _Chance(NamedTuple):
    """A replay, retry, resume or local prefill: why, and on whom."""

    at: float
    kind: str
    cause: str
    worker: str


class _ChoiceRecord(Struct, eq=False, gc=False):
    """One choice; `past` and `end` come when it has ended."""

    chances: list[_Chance] = []
    past: Past = NO_PAST
    end: EndChoice | None = None
    status: int = 0
    message: str = ""
    output_tokens: int = 0


class _Record(Struct, eq=False, gc=False):
    """One request."""

    began: float
    began_wall: float
    door: str = ""
    model: str = ""
    over_at: float | None = None
    status: int | None = None
    """What the client was told; None: nothing (yet, or it went)."""
    error: dict[str, Any] | None = None
    """What was said, not the exception: that keeps the frames it went through, and their bodies."""
    choices: dict[str, _ChoiceRecord] = {}

    @property
    def was_served(self) -> bool:
        """Some worker could have had it."""
        for one in self.choices.values():
            if one.end is None or one.end.outcome != "rejected":
                return True
        return False

    def cost(self) -> int:
        cost = _RECORD_COST * (1 + len(self.choices))
        for one in self.choices.values():
            cost += (len(one.past.story) + len(one.chances)) * _LINE_COST
            cost += len(one.past.legs) * _LEG_COST
        return cost


class Stories:
    """One per router process. `clock` and `wall_clock` in seconds; `past` reads a living choice."""

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        past: Callable[[str], Past],
        count: Callable[[int, str], None] = lambda _status, _code: None,
    ) -> None:
        """`count`: hears status and code of every answer that is an error."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._past = past
        self._count = count
        self._running: dict[str, _Record] = {}
        self._ended: OrderedDict[str, tuple[_Record, int]] = OrderedDict()
        self._refused: OrderedDict[str, _Record] = OrderedDict()
        self.cost = 0
        """Of what has ended, as charged against `MAX_COST`."""

    def __len__(self) -> int:
        return len(self._running) + len(self._ended) + len(self._refused)

    # -- what is told

    def began(self, request_id: str) -> None:
        self._running[request_id] = _Record(self._clock(), self._wall_clock())

    def submitted(self, choice: str, model: str) -> None:
        record = self._running.get(request_of(choice))
        if record is not None:
            record.model = model
            record.choices[choice] = _ChoiceRecord()

    def noted(self, choice: str, kind: str, cause: str, worker: str) -> None:
        one = self._choice(choice)
        if one is not None:
            one.chances.append(_Chance(self._clock(), kind, cause, worker))
            if len(one.chances) > MAX_CHANCES:
                del one.chances[0]

    def choice_ended(self, end: EndChoice, error: ClientError | None, output_tokens: int) -> None:
        one = self._choice(end.choice)
        if one is None:
            return
        one.end = end
        one.past = self._past(end.choice)
        one.status = 200 if error is None else error.status
        one.message = "" if error is None else error.message[:MAX_TEXT]
        one.output_tokens = output_tokens

    def over(self, request_id: str) -> None:
        """The request is over, whichever way; what still runs of it was cancelled before."""
        record = self._running.pop(request_id, None)
        if record is None:
            return
        record.over_at = self._clock()
        if not record.choices and record.status is not None and record.status < 400:
            return  # a list of models, say: there is nothing to tell
        if record.was_served:
            self._keep(request_id, record)
        else:
            self._keep_refused(request_id, record)

    def answered(
        self,
        request_id: str,
        door: str,
        status: int,
        error: ClientError | None = None,
        *,
        has_begun: bool = True,
    ) -> None:
        """What the client was told. Who was refused at the door (`has_begun` is false) has no
        record before this, whoever else had the same id."""
        if error is not None:
            self._count(status, error.code)
        record = self._untold(request_id) if has_begun else None
        if record is None:
            if status < 400:
                return
            record = _Record(self._clock(), self._wall_clock(), over_at=self._clock())
            self._keep_refused(request_id, record)
        record.door = door[:MAX_TEXT]
        record.status = status
        record.error = _error(error)

    # -- rings

    def _choice(self, choice: str) -> _ChoiceRecord | None:
        record = self._running.get(request_of(choice))
        return record.choices.get(choice) if record is not None else None

    def _keep(self, request_id: str, record: _Record) -> None:
        cost = record.cost()
        self._drop(request_id)
        self._ended[request_id] = record, cost
        self.cost += cost
        while len(self._ended) > MAX_ENDED or (self.cost > MAX_COST and len(self._ended) > 1):
            self._drop(next(iter(self._ended)))

    def _drop(self, request_id: str) -> None:
        _, cost = self._ended.pop(request_id, (None, 0))
        self.cost -= cost

    def _keep_refused(self, request_id: str, record: _Record) -> None:
        self._refused[request_id] = record
        self._refused.move_to_end(request_id)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def _all(self, request_id: str) -> list[_Record]:
        """What runs, then what was served, then what was refused under this id."""
        ended = self._ended.get(request_id)
        found = (
            self._running.get(request_id),
            ended[0] if ended is not None else None,
            self._refused.get(request_id),
        )
        return [record for record in found if record is not None]

    def _untold(self, request_id: str) -> _Record | None:
        youngest: _Record | None = None
        for record in self._all(request_id):
            if record.status is None and (youngest is None or record.began > youngest.began):
                youngest = record
        return youngest

    # -- what is shown

    def of(self, wanted: str) -> dict[str, Any] | None:
        """Of a request, or of one of its choices (`<request>/<i>`); None if nothing is known."""
        request_id, _, index = wanted.partition("/")
        found = self._all(request_id)
        if not found or (index and wanted not in found[0].choices):
            return None
        record = found[0]
        chosen = [wanted] if index else list(record.choices)
        until = self._clock() if record.over_at is None else record.over_at
        shown: dict[str, Any] = {
            "request": request_id,
            "state": self._state(record),
            "door": record.door,
            "model": record.model,
            "began": _iso(record.began_wall),
            "took_s": round(until - record.began, 4),
            "status": record.status,
            "error": record.error,
            "choices": [self._shown(record, choice) for choice in chosen],
        }
        refused = self._refused.get(request_id)
        if refused is not None and refused is not record:
            told = {"began": _iso(refused.began_wall), "status": refused.status}
            shown["also_refused"] = {**told, "error": refused.error}
        return shown

    def _state(self, record: _Record) -> str:
        if record.over_at is None:
            return "running"
        return "ended" if record.was_served else "refused"

    def _shown(self, record: _Record, choice: str) -> dict[str, Any]:
        one = record.choices[choice]
        past = one.past if one.end is not None else self._past(choice)
        since = _Since(record.began, record.began_wall)
        shown: dict[str, Any] = {"choice": choice}
        if one.end is not None:
            shown["outcome"] = one.end.outcome
            shown["leg"] = one.end.leg
            shown["status"] = one.status
            shown["output_tokens"] = one.output_tokens
            if one.end.code:
                shown["error"] = {"code": one.end.code, "message": one.message}
        shown["legs"] = [_leg(leg, since) for leg in past.legs]
        shown["second_chances"] = [
            {**since.at(c.at), "what": c.kind, "cause": c.cause, "worker": c.worker}
            for c in one.chances
        ]
        shown["story"] = [
            {"at_s": round(at, 4), **since.at(at), "what": f"{what} {detail[:MAX_TEXT]}".rstrip()}
            for at, what, detail in past.story
        ]
        return shown


class _Since(NamedTuple):
    """Turns the router's clock into the world's, and into seconds of the request."""

    began: float
    began_wall: float

    def at(self, now: float) -> dict[str, Any]:
        after = now - self.began
        return {"after_s": round(after, 4), "at": _iso(self.began_wall + after)}

    def after(self, now: float) -> float | None:
        return round(now - self.began, 4) if now else None


def _leg(leg: LegTrace, since: _Since) -> dict[str, Any]:
    shown = {
        "leg": leg.kind,
        "attempt": leg.attempt,
        "worker": leg.worker,
        "incarnation": leg.incarnation,
        **since.at(leg.sent_at),
        "accepted_after_s": since.after(leg.accepted_at),
        "decoding_after_s": since.after(leg.decoding_at),
        "ended_after_s": since.after(leg.ended_at),
        "ended": "" if not leg.ended_at else "answered" if leg.answered else "stopped",
        "cause": leg.cause,
    }
    return {name: value for name, value in shown.items() if value not in (None, "")}


def _error(error: ClientError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"code": error.code, "message": error.message[:MAX_TEXT], "param": error.param}


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")

"""When two states of a process are the same: everything they hold, up to names and the time of day.

The walk takes every field of every object it reaches, unless `SKIPPED` names it with a reason, so a
field that is added to a machine is looked at without anybody's doing. What is left out is either a
count for people, or a supply of fresh names, or never changes.

Names (attempts, serials, pulls, nonces, handles, incarnations) are told from other numbers by their
size alone: every supply begins at its own large number. Absolute times are large floats; they are
written relative to the process's own clock, and all that is longer ago than any deadline is equal.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, Final

import msgspec

from protocol.ids import JobKey
from router.attempts import STRAY_S
from router.inbox import _Source as InboxSource
from router.scheduling.deadlines import Deadlines, Timer
from router.scheduling.fleet import Worker
from router.scheduling.pools import Pool
from tests.model.check.copies import constant_number
from tests.model.check.scopes import LIMITS
from worker.routers import MAX_TICK_S, Routers

LONG_AGO_S: Final = -6.5
SUSPECT_MAX_S: Final = LIMITS.suspect_max_s
_FIRST_NAME: Final = 1_000_000
_HANDLE_LENGTH: Final = 32
_TIMES: Final = 500_000.0

Shape = Any
"""Nested tuples in which names are numbers of first appearance."""

SKIPPED: Final[dict[str, frozenset[str]]] = {
    # Supplies of fresh names.
    "Tables": frozenset({"_next_attempt", "out", "_ended", "budget", "now", "bus_now"}),
    "Puller": frozenset({"_next_id", "counts", "_block_bytes", "_why"}),
    "Thread": frozenset({
        "_nonce", "_serials", "_stats", "_load", "_wake", "_reasons", "_config", "_runner",
        "_arena", "_leases", "_scratch", "_transfers", "_loop", "scratch",
    }),
    "Lender": frozenset({"_nonce", "_identity", "_offers"}),
    # Counters and stories for people.
    "Source": frozenset({"ended", "_now"}),
    "Lease": frozenset({"lent_at"}),
    "Sink": frozenset({"ended", "_now"}),
    "Pairs": frozenset({"_ways", "_marks"}),
    "Choice": frozenset({
        "story", "legs", "hashes", "arrived_at", "last_at", "dispatched_at", "first_at", "lent_at",
        "cached_tokens",
    }),
    "Attempt": frozenset({"started_at", "trace", "idle_signs", "output_seen"}),
    "BlockPool": frozenset({"_unreported", "_cleared"}),
    "EngineCore": frozenset({
        "_num_events", "_num_steps", "_prefilled_tokens", "_cached_tokens", "_decoded_tokens",
        "_runner", "_tokenizer", "_limits", "_config", "_grammars", "_outputs",
    }),
    "Roster": frozenset({"num_preempted", "_num_stores"}),
    "ActiveSequence": frozenset({
        "limits", "sampling", "seed", "text", "submitted_at", "started_at", "cached_tokens",
        "refused_at", "hashes",
    }),
    "Inbox": frozenset({
        "_bad", "_bad_logged_at", "_metrics", "_subjects", "_on_client_gone", "_strays", "_sources",
        "_tell", "_transports",
    }),
    "Front": frozenset({
        "postbox", "_metrics", "_subjects", "_jobs", "_pending", "_handling", "_is_reading",
        "_has_news",
    }),
    "Desk": frozenset({
        "_subjects", "num_bad", "postbox", "_mailer", "telemetry", "_bus", "_role", "_worker",
    }),
    "OutputDelivery": frozenset({"_cached", "_last_event"}),
    "RouterProcess": frozenset({"now", "scope", "max_dispatches"}),
    "WorkerProcess": frozenset({"now", "lent", "two_sided", "is_prefill"}),
    "Worker": frozenset({
        "info", "slot", "report", "steps_at", "snapshot_asked", "foreign_blocks", "group",
        "suspected_at", "suspect_level",
    }),
    "Fleet": frozenset({"index", "by_slot"}),
    "Model": frozenset({"known_until", "hope_until"}),
    "Pool": frozenset({"buckets", "occupied", "members"}),
    "Scheduler": frozenset({"_handlers", "_on_due", "_mover", "_placer", "_bus_was"}),
    "Record": frozenset({"progressed_at"}),
    "Prefilled": frozenset({"queue_s", "prefill_s"}),
    "Decoding": frozenset({"transfer_s"}),
    "Listener": frozenset({"expected"}),
    "Attempts": frozenset({"_done"}),
    "GuardedWords": frozenset({"pool", "blocks"}),
    "Memory": frozenset({"num_blocks", "block_bytes"}),
    "Reads": frozenset({"scratch", "memory", "incarnation", "name"}),
    "Lent": frozenset({"decode_blocks"}),
}  # fmt: skip
"""Fields by class; the rest is walked."""


class Walk:
    """One process, made into a shape and the names in it."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.names: list[Any] = []
        self.weak: list[tuple[str, int, float]] = []
        """What is remembered of attempts that perhaps nobody else remembers."""
        self._known: dict[Any, int] = {}
        self._seen: dict[int, int] = {}

    def name(self, name: Any) -> tuple[str, int]:
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = len(self.names)
            self.names.append(name)
        return ("n", known)

    def of(self, value: Any) -> Shape:
        handler = _HANDLERS.get(type(value))
        if handler is None:
            handler = _HANDLERS[type(value)] = _handler_for(type(value))
        return handler(self, value)


def _same(_: Walk, value: Any) -> Shape:
    return value


def _int(walk: Walk, value: int) -> Shape:
    return value if -_FIRST_NAME < value < _FIRST_NAME else walk.name(value)


def _float(walk: Walk, value: float) -> Shape:
    if -_TIMES < value < _TIMES or value in (float("inf"), float("-inf")):
        return value
    return max(LONG_AGO_S, round(value - walk.now, 6))


def _str(walk: Walk, value: str) -> Shape:
    if len(value) == _HANDLE_LENGTH and value.startswith("0000"):
        return walk.name(value)
    return walk.name(value) if is_incarnation(value) else value


_incarnations: set[str] = set()


def is_incarnation(text: str) -> bool:
    return text in _incarnations


def name_incarnation(text: str) -> None:
    """This string is one from now on."""
    _incarnations.add(text)


def _items(walk: Walk, value: Any) -> Shape:
    of = walk.of
    return tuple([of(item) for item in value])


def _dict(walk: Walk, value: dict[Any, Any]) -> Shape:
    of = walk.of
    return tuple([(of(key), of(item)) for key, item in value.items()])


def _set(walk: Walk, value: Any) -> Shape:
    return tuple([walk.of(item) for item in sorted(value)])


def _key(walk: Walk, value: JobKey) -> Shape:
    return walk.name(value.attempt)


def _timer(walk: Walk, timer: Timer) -> Shape:
    return None if timer.due is None else walk.of(timer.due)


def _deadlines(walk: Walk, deadlines: Deadlines) -> Shape:
    """Who is due in which order; equal deadlines fire in the order of their entries."""
    armed = sorted(
        (timer.due, number, timer)
        for when, number, timer in deadlines._heap
        if timer.due is not None and timer.entry == when
    )
    return tuple([(timer.kind, walk.of(due), walk.of(timer.owner)) for due, _, timer in armed])


def _pool(walk: Walk, pool: Pool) -> Shape:
    return tuple([walk.of(seat.worker) for seat in pool.order])


def _routers(walk: Walk, routers: Routers) -> Shape:
    """Silence in time in which we listened; the number of the last envelope is the world's."""
    longest = routers._timeout_s + MAX_TICK_S
    listened = routers._listened_s
    silent = [(name, min(longest, listened - at)) for name, at in routers._heard.items()]
    ticked = routers._ticked_at
    return (tuple(silent), None if ticked is None else max(-MAX_TICK_S, ticked - walk.now))


def _source(_: Walk, source: InboxSource) -> Shape:
    """How far it is behind; what it has seen is the world's."""
    return source.tail - source.seen if source.tail else 0


def _sources(walk: Walk, sources: dict[tuple[str, str], InboxSource]) -> Shape:
    """Of whom something is known to be missing."""
    return tuple([(walk.of(key), _source(walk, one)) for key, one in sources.items() if one.tail])


def _strays(walk: Walk, strays: dict[tuple[str, int], float]) -> Shape:
    """Answers that must not be repeated yet; they only matter while the attempt is known."""
    recent = [(key, walk.now - at) for key, at in strays.items() if walk.now - at < STRAY_S]
    walk.weak += [("stray", attempt, age) for (_, attempt), age in recent]


def _done(walk: Walk, done: dict[int, int]) -> Shape:
    """Attempts that ended well, whose repeats are not answered."""
    walk.weak += [
        ("done", 64 * group + bit, 0)
        for group, bits in done.items()
        for bit in range(64)
        if bits >> bit & 1
    ]


def _suspicion(walk: Walk, worker: Worker) -> Shape:
    """Forgiven after a while, whatever the level was."""
    since = walk.now - worker.suspected_at
    return (worker.suspect_level, since) if since <= 2 * SUSPECT_MAX_S else None


def _partial(walk: Walk, value: Any) -> Shape:
    return (value.func.__name__, walk.of(value.args))


def _function(_: Walk, value: Any) -> Shape:
    return value.__name__


SPECIAL: Final[dict[str, tuple[Callable[[Walk, Any], Shape], ...]]] = {
    "Worker": (_suspicion,),
    "Inbox": (
        lambda walk, inbox: _strays(walk, inbox._strays._answered),
        lambda walk, inbox: _sources(walk, inbox._sources),
    ),
    "Attempts": (lambda walk, attempts: _done(walk, attempts._done),),
}
"""What is said of an object in other words than its fields."""

_HANDLERS: Final[dict[type, Callable[[Walk, Any], Shape]]] = {
    int: _int, float: _float, str: _str, bool: _same, bytes: _same, type(None): _same,
    list: _items, tuple: _items, deque: _items, array: _items, dict: _dict, OrderedDict: _dict,
    set: _set, frozenset: _set, JobKey: _key, Timer: _timer, Deadlines: _deadlines, Pool: _pool,
    Routers: _routers, InboxSource: _source, partial: _partial,
    type(_same): _function, type(Walk(0.0).of): _function,
}  # fmt: skip


def _handler_for(kind: type) -> Callable[[Walk, Any], Shape]:
    if issubclass(kind, Enum):
        return lambda _, value: value.value
    if issubclass(kind, msgspec.Struct):
        skipped = SKIPPED.get(kind.__name__, frozenset())
        names = [name for name in kind.__struct_fields__ if name not in skipped]
        title = kind.__name__
        return lambda walk, value: (title, *[walk.of(getattr(value, name)) for name in names])
    return _object_handler(kind)


def _object_handler(kind: type) -> Callable[[Walk, Any], Shape]:
    skipped = SKIPPED.get(kind.__name__, frozenset())
    slots = [
        slot
        for base in reversed(kind.__mro__)
        for slot in base.__dict__.get("__slots__", ())
        if slot not in skipped
    ]

    special = SPECIAL.get(kind.__name__, ())

    def walk_object(walk: Walk, value: Any) -> Shape:
        number = constant_number(value)
        if number is not None:
            return ("constant", number)
        seen = walk._seen.get(id(value))
        if seen is not None:
            return ("seen", seen)
        walk._seen[id(value)] = len(walk._seen)
        of = walk.of
        fields = [of(getattr(value, slot)) for slot in slots]
        if hasattr(value, "__dict__"):
            fields += [of(item) for name, item in value.__dict__.items() if name not in skipped]
        fields += [handler(walk, value) for handler in special]
        return (kind.__name__, *fields)

    return walk_object

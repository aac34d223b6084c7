"""The states of a pull: which event leads where, and what a pull holds in each.

Everything about the automaton is in this file; what is done on the way is the sink's.

    state         what is live   on                     next
    WAITING       -              start (there is room)  PULLING
                                 abandon                FREED
                                 timed out              FAILED
    PULLING       the data       came without a word    CHECKING
                                 came, word right       READY
                                 came, word wrong       FAILED        lease_lost
                                 failed                 FAILED        transfer_failed
                                 abandon                FENCED_DATA
                                 timed out              FENCED_DATA   transfer_failed
    CHECKING      the word       word right             READY
                                 word wrong             FAILED        lease_lost
                                 failed                 FAILED        transfer_failed
                                 abandon                FENCED_WORD
                                 timed out              FENCED_WORD   transfer_failed
    FENCED_DATA   the data       any end of the data    FREED
    FENCED_WORD   the word       any end of the word    FREED
    READY, FAILED, FREED         the pull is forgotten

Late are the data's end once more in CHECKING and FENCED_WORD, and a second abandon: the table leads
back to the same state, which means that nothing is done. What has no row was never asked for, the
end of an operation that was not posted for example.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

from protocol.out import FailureCode


class PullState(Enum):
    """Where a pull is."""

    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    WAITING = "waiting"
    PULLING = "pulling"
    CHECKING = "checking"
    FENCED_DATA = "fenced, data live"
    FENCED_WORD = "fenced, word live"
    READY = "ready"
    FAILED = "failed"
    FREED = "freed"


class PullEvent(Enum):
    """What moves it."""

    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    START = "start"
    DATA_CAME = "data came"
    DATA_RIGHT = "data came, word right"
    DATA_WRONG = "data came, word wrong"
    DATA_FAILED = "data failed"
    WORD_RIGHT = "word right"
    WORD_WRONG = "word wrong"
    WORD_FAILED = "word failed"
    ABANDON = "abandon"
    TIME_OUT = "time out"


_DATA_ENDS: Final = (
    PullEvent.DATA_CAME,
    PullEvent.DATA_RIGHT,
    PullEvent.DATA_WRONG,
    PullEvent.DATA_FAILED,
)
_WORD_ENDS: Final = (PullEvent.WORD_RIGHT, PullEvent.WORD_WRONG, PullEvent.WORD_FAILED)


def _row(
    state: PullState, moves: Mapping[PullEvent, PullState], late: Iterable[PullEvent] = ()
) -> dict[tuple[PullState, PullEvent], PullState]:
    """What moves a pull out of `state`, and what comes too late to."""
    return {(state, event): state for event in late} | {
        (state, event): target for event, target in moves.items()
    }


NEXT: Final = (
    _row(
        PullState.WAITING,
        {
            PullEvent.START: PullState.PULLING,
            PullEvent.ABANDON: PullState.FREED,
            PullEvent.TIME_OUT: PullState.FAILED,
        },
    )
    | _row(
        PullState.PULLING,
        {
            PullEvent.DATA_CAME: PullState.CHECKING,
            PullEvent.DATA_RIGHT: PullState.READY,
            PullEvent.DATA_WRONG: PullState.FAILED,
            PullEvent.DATA_FAILED: PullState.FAILED,
            PullEvent.ABANDON: PullState.FENCED_DATA,
            PullEvent.TIME_OUT: PullState.FENCED_DATA,
        },
    )
    | _row(
        PullState.CHECKING,
        {
            PullEvent.WORD_RIGHT: PullState.READY,
            PullEvent.WORD_WRONG: PullState.FAILED,
            PullEvent.WORD_FAILED: PullState.FAILED,
            PullEvent.ABANDON: PullState.FENCED_WORD,
            PullEvent.TIME_OUT: PullState.FENCED_WORD,
        },
        late=_DATA_ENDS,
    )
    | _row(
        PullState.FENCED_DATA,
        dict.fromkeys(_DATA_ENDS, PullState.FREED),
        late=(PullEvent.ABANDON,),
    )
    | _row(
        PullState.FENCED_WORD,
        dict.fromkeys(_WORD_ENDS, PullState.FREED),
        late=(*_DATA_ENDS, PullEvent.ABANDON),
    )
)


class Held(Enum):
    """What it may hold."""

    __hash__ = object.__hash__  # Enum's own is Python code; members are singletons.

    QUEUE = "a place in the queue"
    TOKENS = "its share of the tokens in flight"
    SLOT = "a scratch slot"
    DEADLINE = "a deadline"
    QUARANTINE = "its blocks, in quarantine"


HOLDS: Final[dict[PullState, frozenset[Held]]] = {
    PullState.WAITING: frozenset({Held.QUEUE}),
    PullState.PULLING: frozenset({Held.TOKENS, Held.SLOT, Held.DEADLINE}),
    PullState.CHECKING: frozenset({Held.SLOT, Held.DEADLINE}),
    PullState.FENCED_DATA: frozenset({Held.QUARANTINE}),
    PullState.FENCED_WORD: frozenset({Held.QUARANTINE, Held.SLOT}),
    PullState.READY: frozenset(),
    PullState.FAILED: frozenset(),
    PullState.FREED: frozenset(),
}

CHANGES: Final = {
    (before, after): (
        HOLDS[before] - (HOLDS[after] - {Held.DEADLINE}),
        HOLDS[after] - (HOLDS[before] - {Held.DEADLINE}),
    )
    for (before, _), after in NEXT.items()
}
"""What a move gives back, and what it takes: also a deadline that goes on, since it restarts."""

FAILURES: Final[dict[PullEvent, FailureCode]] = {
    PullEvent.DATA_WRONG: "lease_lost",
    PullEvent.WORD_WRONG: "lease_lost",
    PullEvent.DATA_FAILED: "transfer_failed",
    PullEvent.WORD_FAILED: "transfer_failed",
    PullEvent.TIME_OUT: "transfer_failed",
}
"""What the router is told, if it has not given up by then."""

COUNTED_AS: Final[dict[PullEvent, str]] = {
    PullEvent.DATA_RIGHT: "ready",
    PullEvent.WORD_RIGHT: "ready",
    PullEvent.ABANDON: "abandoned",
    **FAILURES,
}
"""Under which end a pull is counted, if it was not given up before."""

FENCED: Final = frozenset({PullState.FENCED_DATA, PullState.FENCED_WORD})

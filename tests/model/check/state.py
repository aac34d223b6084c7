"""A state of the whole world, and the words for what happens to it."""

from typing import Any, Final, NamedTuple

Action = tuple[Any, ...]
"""What happens, and where."""

Letter = tuple[str, bytes]
"""The incarnation that it is for, or from; the payload. Empty payload: nobody listens there."""


class Env(NamedTuple):
    """What may still go wrong, and who is not well."""

    lives: tuple[int, ...]
    paused: tuple[bool, ...]
    unlisted: tuple[int, ...]
    """The life of each worker that is dead and still listed; 0 if there is none."""
    crashes: int
    losses: int
    repeats: int
    swaps: int
    pauses: int
    cancels: int
    deaths: int
    strangers: int
    slow: int
    """How many deadlines may fire though something else could have happened before."""


class State(NamedTuple):
    router: int
    workers: tuple[int, ...]
    down: tuple[tuple[Letter, ...], ...]
    """From the router to each worker."""
    up: tuple[tuple[Letter, ...], ...]
    """From each worker to the router."""
    news: tuple[tuple[str, int, int], ...]
    """What discovery has not told the router yet."""
    env: Env


FAULTS: Final = frozenset(
    {"crash", "lose", "repeat", "swap", "pause", "cancel", "death", "stranger", "hush", "slow"}
)
"""What goes wrong. A restart is none, but nothing may depend on one."""

PASS_S: Final = 0.5
"""How far one clock for all moves at once."""

WORK: Final = frozenset({"deliver", "turn", "read", "tell", "news", "tail"})
"""What does not take the time that deadlines measure."""

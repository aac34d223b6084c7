"""What is explored: small fleets with few faults, to be looked at whole, and a big one.

A scope says who is there, what may go wrong and how often. Times are few and on a grid of half
seconds, so that few relative times arise; their order is the one of the defaults.
"""

from dataclasses import dataclass, field
from typing import Final

from router.scheduling.limits import Limits

LEASE_S: Final = 6.0
SINK_TIMEOUT_S: Final = 4.0
LINGER_S: Final = 4.0
ROUTER_TIMEOUT_S: Final = 2.0
PAUSE_S: Final = 4.0
"""So far a paused process's clock has gone on when it resumes."""

LIMITS: Final = Limits(
    queue_timeout_s=8.0,
    accept_timeout_s=1.0,
    silence_timeout_s=2.0,
    prefill_timeout_s=4.0,
    decode_wait_timeout_s=8.0,
    kv_transfer_timeout_s=6.0,
    stall_timeout_s=4.0,
    replay_timeout_s=1.0,
    max_attempts=2,
    retry_floor=10_000,
    lease_s=LEASE_S,
    unlisted_grace_s=6.0,
    suspect_s=1.0,
    suspect_max_s=2.0,
    local_prefill_tokens=1,
)


@dataclass(frozen=True)
class Scope:
    """One fleet and its budget of faults."""

    name: str
    prefill: int = 1
    decode: int = 1
    prompts: tuple[tuple[int, ...], ...] = ((11, 12, 13),)
    """Token ids of each choice's prompt."""
    max_tokens: int = 2
    block_size: int = 2
    prefill_blocks: int = 4
    decode_blocks: int = 4
    max_running: int = 2
    num_leases: int = 2
    num_scratch: int = 2
    max_tokens_in_flight: int | None = None
    two_sided: bool = False
    """The source reads its own blocks out, and looks at the word after the last one."""
    crashes: int = 0
    restarts: bool = True
    losses: int = 0
    repeats: int = 0
    """Messages that arrive twice."""
    swaps: int = 0
    """Neighbours in a channel that change places."""
    pauses: int = 0
    cancels: int = 0
    router_deaths: int = 0
    strangers: int = 0
    """How often somebody else's work takes, writes and gives back all free blocks of a worker."""
    slow: int = 0
    """How many deadlines may fire while something else could still happen."""
    prompt_time: bool = False
    """One clock for all, which moves only when nothing but decoding is left to do: whatever
    expires then, expires without a fault."""
    limits: Limits = field(default=LIMITS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(
            [f"prefill-{n}" for n in range(self.prefill)]
            + [f"decode-{n}" for n in range(self.decode)]
        )


TWO_PROMPTS: Final = ((11, 12, 13), (21, 22, 23))

SMALL: Final = (
    Scope("1P 1D: no fault"),
    Scope("1P 1D: two early deadlines", slow=2),
    Scope("1P 1D: a crash", crashes=1),
    Scope("1P 1D: a loss and an early deadline", losses=1, slow=1),
    Scope("1P 1D: two losses, three tokens", losses=2, max_tokens=3),
    Scope("1P 1D: repeat, swap and loss", repeats=1, swaps=1, losses=1, max_tokens=3),
    Scope("1P 1D: a stranger and an early deadline", strangers=1, slow=1),
    Scope("1P 1D: a cancel and an early deadline", cancels=1, slow=1),
    Scope("1P 1D: the router dies, one early deadline", router_deaths=1, slow=1),
    Scope("1P 1D: the router dies, a pause", router_deaths=1, pauses=1),
    Scope("1P 1D: a pause and a stranger", pauses=1, strangers=1),
    Scope("1P 1D: nothing is late, transfers are slow", prompt_time=True, prompts=((11, 12),)),
    Scope("1P 1D, two-sided: a crash", two_sided=True, crashes=1),
    Scope("1P 1D, two-sided: a stranger, early deadline", two_sided=True, strangers=1, slow=1),
    Scope("1P 1D, two-sided: a pause", two_sided=True, pauses=1),
    Scope("1P 2D: two early deadlines", decode=2, slow=2),
    Scope("1P 2D: a pause", decode=2, pauses=1),
    Scope("2P 2D: a loss", prefill=2, decode=2, losses=1),
    Scope("2 choices, 1P 1D: no fault", prompts=TWO_PROMPTS, decode_blocks=6),
    Scope("2 choices, 1P 2D: a cancel", prompts=TWO_PROMPTS, decode=2, cancels=1),
    Scope(
        "2 choices, 1P 1D: one lease slot, a stranger", prompts=TWO_PROMPTS, num_leases=1,
        decode_blocks=6, strangers=1,
    ),
    Scope("1P 1D: two crashes", crashes=2),
    Scope("1P 2D: a crash and a cancel", decode=2, crashes=1, cancels=1),
    Scope("1P 1D: a crash and a loss", crashes=1, losses=1),
    Scope("1P 1D: a crash and a pause", crashes=1, pauses=1),
    Scope("2P 2D: a pause and a loss", prefill=2, decode=2, pauses=1, losses=1),
    Scope("2P 2D: the router dies, a crash", prefill=2, decode=2, router_deaths=1, crashes=1),
    Scope("2 choices, 1P 1D: a loss", prompts=TWO_PROMPTS, decode_blocks=6, losses=1),
    Scope("2 choices, 1P 1D: a crash", prompts=TWO_PROMPTS, decode_blocks=6, crashes=1),
    Scope(
        "2 choices, 1P 2D, two-sided: a pause", prompts=TWO_PROMPTS, decode=2, two_sided=True,
        pauses=1,
    ),
)  # fmt: skip
"""Looked at whole, given the states."""

BIG: Final = Scope(
    "2 choices, 2P 2D: everything", prefill=2, decode=2, prompts=TWO_PROMPTS, max_tokens=3,
    decode_blocks=6, crashes=2, losses=2, repeats=1, swaps=1, pauses=1, cancels=1,
    router_deaths=1, strangers=1, slow=2,
)  # fmt: skip
"""Never looked at whole."""

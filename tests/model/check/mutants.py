"""The planted mistakes, each with the scope in which it must be found.

A mutant that is not found means that the checker is blind, not that the product is good.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tests.model.check import planted
from tests.model.check.planted import Patch
from tests.model.check.scopes import LIMITS, Scope


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    scope: Scope
    patches: Callable[[], Sequence[Patch]]
    max_states: int = 10_000
    """It is found within so many."""


_STRANGER: Final = Scope("stranger", strangers=1, slow=1)
_LOSS: Final = Scope("loss", losses=1, max_tokens=3)
_SLOW: Final = Scope("slow", slow=1)
_TWO: Final = Scope("two prompts", prompts=((11, 12, 13), (21, 22, 23)), decode_blocks=6)

MUTANTS: Final = (
    Mutant("no check", _STRANGER, planted.no_check),
    Mutant("word read before the data", _STRANGER, planted.word_before_data),
    Mutant(
        "word looked at before the last byte, two-sided",
        Scope("two-sided stranger", two_sided=True, strangers=1, slow=1),
        planted.server_looks_early,
    ),
    Mutant("word zeroed after the references drop", Scope("plain"), planted.word_zeroed_late),
    Mutant(
        "word of the lease before",
        Scope(
            "one slot",
            prompts=((11, 12, 13), (21, 22, 23)),
            num_leases=1,
            decode_blocks=6,
            slow=1,
            strangers=1,
        ),
        planted.nonce_reused,
        max_states=20_000,
    ),
    Mutant("blocks freed before the transfer is terminal", _SLOW, planted.free_before_terminal),
    Mutant("quarantine not kept", _SLOW, planted.quarantine_not_kept),
    Mutant(
        "scratch slot reused",
        Scope("slow twice", slow=2, num_scratch=1),
        planted.scratch_slot_reused,
    ),
    Mutant("cancel leaks a pull", Scope("cancel", cancels=1), planted.cancel_leaks_pull),
    Mutant("double release", Scope("plain"), planted.double_release),
    Mutant("lease never expires", Scope("death", router_deaths=1), planted.lease_never_expires),
    Mutant("lent blocks are evictable", Scope("stranger", strangers=1), planted.lent_is_evictable),
    Mutant(
        "renew forgotten",
        Scope("prompt", prompt_time=True, prompts=((11, 12),)),
        planted.renew_forgotten,
    ),
    Mutant(
        "renew ignored",
        Scope("prompt", prompt_time=True, prompts=((11, 12),)),
        planted.renew_ignored,
    ),
    Mutant(
        "release of another incarnation honoured",
        Scope("crash", crashes=1),
        planted.foreign_incarnation_obeyed,
    ),
    Mutant("attempt ignored", _SLOW, planted.attempt_ignored),
    Mutant("handle of another prompt accepted", _TWO, planted.wrong_handle),
    Mutant(
        "retry on the same worker", Scope("two decode", decode=2, slow=1), planted.same_worker_again
    ),
    Mutant("deadline not armed", Scope("plain"), planted.deadline_not_armed),
    Mutant("accept timeout waits on", Scope("loss", losses=1), planted.accept_timeout_waits_on),
    Mutant("deadlines wait on", Scope("loss", losses=1), planted.stall_waits_on),
    Mutant(
        "tries not counted",
        Scope("one try", slow=2, limits=replace(LIMITS, max_attempts=1)),
        planted.tries_not_counted,
    ),
    Mutant("load not freed", Scope("plain"), planted.load_not_freed),
    Mutant("replay off by one", _LOSS, planted.replay_off_by_one),
    Mutant(
        "repeats are taken", Scope("repeat", repeats=1, max_tokens=3), planted.repeats_are_taken
    ),
    Mutant("a gap is skipped", _LOSS, planted.gap_is_skipped),
    Mutant(
        "dead router served", Scope("death", router_deaths=1, slow=2), planted.dead_router_served
    ),
)

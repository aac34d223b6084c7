"""The model checker itself: small scopes hold, planted mistakes are found, stories can be read.

`make model` looks further; this is what every change must survive.
"""

import pytest

from tests.model.check.mutants import MUTANTS, Mutant
from tests.model.check.planted import handles_mixed_up
from tests.model.check.scopes import BIG, SMALL, Scope
from tests.model.check.suite import check, hunt

QUICK = 1000
"""States of each scope."""


@pytest.mark.parametrize("scope", [*SMALL, BIG], ids=lambda scope: scope.name)
def test_what_must_hold_holds(scope: Scope) -> None:
    result = check(scope, QUICK, audited=300)
    assert not result.violation, result.story


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_mistake_is_found(mutant: Mutant) -> None:
    assert hunt(mutant).violation


def test_at_least_one_state_is_met_in_two_ways_and_compared() -> None:
    result = check(Scope("two ways", slow=1), 2000)
    assert result.exhausted
    assert result.num_audited > 10


def test_story_says_who_did_what() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "no check")
    story = hunt(mutant).story
    assert "decode-0 reads block 0 of prefill-0-1" in story
    assert "early: prefill-0 expires what nobody renewed" in story
    assert "=> " in story


def test_sink_refuses_handles_that_were_mixed_up() -> None:
    """The router's mistake alone costs a choice, not its correctness."""
    scope = Scope("two prompts", prompts=((11, 12, 13), (21, 22, 23)), decode_blocks=6)
    mutant = Mutant("handles mixed up", scope, handles_mixed_up)
    assert "the model says" not in hunt(mutant).violation

"""What a parent of routers decides, event by event: no processes, no clock."""

import pytest

from router.crew import (
    EXIT_CONFIG,
    FIRST_DELAY_S,
    MAX_DELAY_S,
    STEADY_S,
    Command,
    Crew,
    Kill,
    Leave,
    Phase,
    Relieve,
    Say,
    Start,
    Stop,
)

START_S, LEAVE_S, HURRY_S = 60.0, 40.0, 5.0


def crew_of(num: int) -> Crew:
    return Crew(num, start_s=START_S, leave_s=LEAVE_S, hurry_s=HURRY_S)


def serving(num: int, now: float = 0.0) -> Crew:
    """All places serve: children 1 to `num`."""
    crew = crew_of(num)
    assert done(crew.begin(now)) == [Start(1, successor=False)]
    others = [Start(number, successor=True) for number in range(2, num + 1)]
    assert done(crew.ready(1, now)) == others
    for number in range(2, num + 1):
        assert crew.ready(number, now) == []
    assert crew.next_deadline() is None
    return crew


def done(commands: list[Command]) -> list[Command]:
    """Without what is only said."""
    return [command for command in commands if not isinstance(command, Say)]


def words(commands: list[Command]) -> str:
    return "; ".join(command.text for command in commands if isinstance(command, Say))


def test_the_first_child_starts_alone_and_has_no_bound() -> None:
    crew = crew_of(3)
    assert crew.begin(0.0) == [Start(1, successor=False)]
    assert crew.next_deadline() is None, "it may wait for NATS"
    assert crew.ready(1, 500.0) == [Start(2, successor=True), Start(3, successor=True)]
    assert crew.next_deadline() == 500.0 + START_S


def test_who_said_how_long_it_needs_to_leave_has_that_long() -> None:
    """Its settings may be newer than the parent's."""
    crew = crew_of(1)
    crew.begin(0.0)
    crew.ready(1, 0.0, leave_s=500.0)
    crew.hangup(1.0)
    assert done(crew.ready(2, 2.0)) == [Relieve(1)]
    assert crew.next_deadline() == 2.0 + 500.0
    crew.ended(1, 0, 3.0)
    crew.stop(4.0)
    assert crew.next_deadline() == 4.0 + LEAVE_S, "the successor has not said"


def test_a_mistake_in_the_settings_ends_the_parent_at_start() -> None:
    crew = crew_of(3)
    crew.begin(0.0)
    assert crew.ended(1, EXIT_CONFIG, 1.0) == [Leave(EXIT_CONFIG)]


def test_another_failure_at_start_is_tried_again_ever_later() -> None:
    crew = crew_of(1)
    crew.begin(0.0)
    now, delays = 0.0, []
    for number in range(1, 10):
        assert done(crew.ended(number, 1, now)) == []
        due = crew.next_deadline()
        assert due is not None
        delays.append(due - now)
        assert crew.tick(due - 0.01) == []
        assert crew.tick(due) == [Start(number + 1, successor=False)]
        now = due
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == MAX_DELAY_S


def test_a_rolling_restart_is_one_place_after_the_other() -> None:
    crew = serving(2)
    assert done(crew.hangup(10.0)) == [Start(3, successor=True)]
    assert done(crew.ready(3, 12.0)) == [Relieve(1)], "only when its successor is ready"
    assert crew.phases() == {1: Phase.LEAVING, 2: Phase.SERVING, 3: Phase.SERVING}
    assert done(crew.ended(1, 0, 15.0)) == [Start(4, successor=True)]
    assert done(crew.ready(4, 17.0)) == [Relieve(2)]
    commands = crew.ended(2, 0, 18.0)
    assert (done(commands), words(commands)) == ([], "rolling restart done")
    assert crew.phases() == {3: Phase.SERVING, 4: Phase.SERVING}
    assert crew.next_deadline() is None


@pytest.mark.parametrize("code", [EXIT_CONFIG, 1, -9])
def test_a_successor_that_fails_ends_the_restart(code: int) -> None:
    crew = serving(2)
    crew.hangup(10.0)
    commands = crew.ended(3, code, 11.0)
    assert done(commands) == []
    assert "given up" in words(commands)
    assert crew.phases() == {1: Phase.SERVING, 2: Phase.SERVING}
    assert crew.next_deadline() is None, "nothing is tried again by itself"
    assert done(crew.hangup(20.0)) == [Start(4, successor=True)]


def test_a_successor_that_is_not_ready_in_time_is_killed() -> None:
    crew = serving(1)
    crew.hangup(10.0)
    assert crew.next_deadline() == 10.0 + START_S
    assert done(crew.tick(10.0 + START_S)) == [Kill(2)]
    assert crew.next_deadline() is None
    assert "given up" in words(crew.ended(2, -9, 71.0))
    assert crew.phases() == {1: Phase.SERVING}


def test_a_relieved_child_that_does_not_leave_is_killed() -> None:
    crew = serving(1)
    crew.hangup(0.0)
    crew.ready(2, 1.0)
    assert done(crew.tick(1.0 + LEAVE_S)) == [Kill(1)]
    assert "done" in words(crew.ended(1, -9, 42.0))


def test_hangups_during_a_restart_are_one_more_after_it() -> None:
    crew = serving(1)
    crew.hangup(0.0)
    for _ in range(3):
        assert done(crew.hangup(1.0)) == []
    crew.ready(2, 2.0)
    assert done(crew.ended(1, 0, 3.0)) == [Start(3, successor=True)]
    crew.ready(3, 4.0)
    assert done(crew.ended(2, 0, 5.0)) == []


def test_a_hangup_after_a_failed_one_is_not_lost() -> None:
    crew = serving(2)
    crew.hangup(0.0)
    crew.hangup(1.0)
    assert done(crew.ended(3, EXIT_CONFIG, 2.0)) == [Start(4, successor=True)]


def test_a_hangup_before_the_first_is_ready_comes_after_it() -> None:
    crew = crew_of(2)
    crew.begin(0.0)
    assert done(crew.hangup(1.0)) == []
    commands = done(crew.ready(1, 2.0))
    assert commands == [Start(2, successor=True), Start(3, successor=True)]
    assert done(crew.ready(3, 3.0)) == [Relieve(1)]
    assert done(crew.ready(2, 3.0)) == []
    assert done(crew.ended(1, 0, 4.0)) == [Start(4, successor=True)]


def test_a_child_that_dies_comes_again_and_the_others_are_left_alone() -> None:
    crew = serving(2)
    commands = crew.ended(2, -9, 10.0)
    assert done(commands) == []
    assert "ended by itself with -9" in words(commands)
    assert crew.tick(10.0 + FIRST_DELAY_S) == [Start(3, successor=True)]
    crew.ready(3, 12.0)
    crew.ended(3, -9, 13.0)
    assert crew.next_deadline() == 13.0 + 2 * FIRST_DELAY_S, "again so soon: later"
    crew.tick(20.0)
    crew.ready(4, 20.0)
    crew.ended(4, -9, 20.0 + STEADY_S)
    assert crew.next_deadline() == 20.0 + STEADY_S + FIRST_DELAY_S


def test_the_only_one_that_dies_comes_again_without_a_bound() -> None:
    crew = serving(1)
    crew.ended(1, 1, 10.0)
    assert crew.tick(11.0) == [Start(2, successor=False)]
    assert crew.next_deadline() is None
    crew.ended(2, EXIT_CONFIG, 12.0)
    assert crew.next_deadline() is not None, "the file may be mended"


def test_an_old_one_that_dies_while_its_successor_starts_has_one() -> None:
    crew = serving(2)
    crew.hangup(0.0)
    assert done(crew.ended(1, -9, 1.0)) == []
    assert done(crew.tick(30.0)) == [], "no third one for the place"
    assert done(crew.ready(3, 31.0)) == [Start(4, successor=True)]


def test_old_and_successor_die_the_place_is_filled_again() -> None:
    crew = serving(2)
    crew.hangup(0.0)
    crew.ended(1, -9, 1.0)
    crew.ended(3, 1, 2.0)
    assert crew.tick(3.0) == [Start(4, successor=True)]


def test_a_restart_takes_a_child_that_starts_anyway_for_the_successor() -> None:
    crew = serving(2)
    crew.ended(1, -9, 0.0)
    assert crew.tick(0.5) == [Start(3, successor=True)]
    assert done(crew.hangup(1.0)) == []
    assert done(crew.ready(3, 2.0)) == [Start(4, successor=True)]


def test_a_restart_does_not_wait_for_a_back_off() -> None:
    crew = serving(2)
    crew.ended(1, -9, 0.0)
    assert done(crew.hangup(0.1)) == [Start(3, successor=True)]
    assert crew.tick(5.0) == []


def test_told_to_stop_all_leave_and_nobody_comes() -> None:
    crew = serving(2)
    crew.hangup(0.0)
    crew.ready(3, 1.0)
    assert done(crew.stop(2.0)) == [Stop(2), Stop(3)], "the first is leaving already"
    assert crew.hangup(3.0) == []
    assert crew.ended(1, 0, 3.0) == []
    assert crew.ended(2, 0, 4.0) == []
    assert crew.ended(3, 0, 5.0) == [Leave(0)]


def test_told_again_they_leave_at_once_or_are_killed() -> None:
    crew = serving(2)
    crew.stop(0.0)
    assert crew.next_deadline() == LEAVE_S
    assert done(crew.stop(1.0)) == [Stop(1), Stop(2)]
    assert crew.next_deadline() == 1.0 + HURRY_S
    assert done(crew.tick(1.0 + HURRY_S)) == [Kill(1), Kill(2)]
    crew.ended(1, -9, 7.0)
    assert crew.ended(2, -9, 7.0) == [Leave(0)]


def test_told_to_stop_while_nobody_is_there() -> None:
    crew = serving(1)
    crew.ended(1, 1, 0.0)
    assert crew.stop(0.1) == [Leave(0)]
    assert crew.tick(10.0) == []


def test_a_word_of_one_that_is_gone_or_leaves_changes_nothing() -> None:
    crew = serving(1)
    crew.hangup(0.0)
    crew.ready(2, 1.0)
    assert crew.ready(1, 2.0) == []
    assert crew.ready(99, 2.0) == []

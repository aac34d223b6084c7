"""What is remembered of dispatches that are over."""

import tracemalloc

from router.attempts import Attempts


def test_the_last_that_ended_well_are_known_and_no_others() -> None:
    attempts = Attempts()
    for number in range(1, 1000):
        attempts.drop(number, done=number % 3 == 0)
    for number in range(-100, 1100):
        assert attempts.is_done(number) == (0 < number < 1000 and number % 3 == 0)


def test_many_that_ended_well_take_little() -> None:
    attempts = Attempts()
    tracemalloc.start()
    for number in range(1, 400_001):
        attempts.drop(number, done=True)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes < 500_000
    assert all(attempts.is_done(number) for number in range(300_000, 400_001))
    assert not attempts.is_done(1)

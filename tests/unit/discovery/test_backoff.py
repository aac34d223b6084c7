"""The waits double, stay bounded and spread."""

from discovery.backoff import delay_s


def test_waits_double_up_to_the_longest() -> None:
    waits = [delay_s(n, jitter=0.0, longest_s=0.5) for n in (1, 2, 3, 4, 5, 1000)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]


def test_jitter_takes_up_to_half_away() -> None:
    assert delay_s(9, jitter=1.0, longest_s=0.5) == 0.25

"""How long to wait before the next try, as a pure function.

It must not know what is tried, and draws no random numbers itself.
"""

FIRST_S = 0.05


def delay_s(failures: int, *, jitter: float, longest_s: float) -> float:
    """Seconds to wait after that many failures in a row (1 or more).

    Doubles from 50 ms to `longest_s`; `jitter` in 0..1 takes up to half of it away, so that a
    fleet does not knock in step.
    """
    doubled = FIRST_S * 2.0 ** min(failures - 1, 16)
    return min(doubled, longest_s) * (1.0 - 0.5 * jitter)

"""The line between a parent and its routers."""

import pytest

from router.inherited import RELIEVED, drain_timeout_of, ready


def test_a_router_says_how_long_it_may_take_to_drain() -> None:
    assert drain_timeout_of(ready(30_000)) == 30_000
    assert drain_timeout_of(ready(0)) == 0


@pytest.mark.parametrize(
    "said", [b"", b"r", b"r300", b"r\n", b"30000\n", b"r-1\n", b"rx\n", RELIEVED]
)
def test_anything_else_is_not_ready(said: bytes) -> None:
    assert drain_timeout_of(said) is None


def test_it_may_come_in_pieces() -> None:
    whole = ready(250)
    answers = [drain_timeout_of(whole[:end]) for end in range(len(whole) + 1)]
    assert answers == [None] * len(whole) + [250]

"""The line between a parent and its routers."""

import pytest

from router.inherited import RELIEVED, drain_timeout_of, is_ready, ready


def test_a_router_says_how_long_it_may_take_to_drain() -> None:
    for drain_timeout_ms in (0, 30_000):
        said = ready(drain_timeout_ms)
        assert is_ready(said)
        assert drain_timeout_of(said) == drain_timeout_ms


@pytest.mark.parametrize("said", [b"r", b"r300", b"r\n", b"r-1\n", b"rx\n"])
def test_one_that_does_not_say_is_ready_all_the_same(said: bytes) -> None:
    """A parent may start routers of an older version."""
    assert is_ready(said)
    assert drain_timeout_of(said) is None


@pytest.mark.parametrize("said", [b"", b"30000\n", RELIEVED])
def test_anything_else_is_not_ready(said: bytes) -> None:
    assert not is_ready(said)
    assert drain_timeout_of(said) is None

"""Silence is what we could have heard; names and numbers stay bounded."""

from worker.routers import Routers


def ticking(routers: Routers, start: float, seconds: int, *, listening: bool = True) -> list[str]:
    silent: list[str] = []
    for second in range(1, seconds + 1):
        silent += routers.tick(start + second, listening=listening)
    return silent


def test_a_router_is_silent_after_the_timeout_and_not_before() -> None:
    routers = Routers(timeout_s=5.0)
    routers.tick(0.0, listening=True)
    routers.hear("a")
    assert ticking(routers, 0.0, 5) == []
    assert routers.tick(6.0, listening=True) == ["a"]


def test_time_without_a_bus_does_not_count() -> None:
    routers = Routers(timeout_s=5.0)
    routers.tick(0.0, listening=True)
    routers.hear("a")
    assert ticking(routers, 0.0, 100, listening=False) == []
    assert ticking(routers, 100.0, 5) == []
    assert "a" in ticking(routers, 105.0, 2)


def test_numbers_go_on_for_a_router_that_was_forgotten() -> None:
    routers = Routers(timeout_s=5.0)
    routers.hear("a")
    assert [routers.next_seq("a"), routers.next_seq("a")] == [1, 2]
    routers.forget("a")
    assert dict(routers.last_seqs) == {}
    assert routers.next_seq("a") == 3
    routers.tick(0.0, listening=True)  # numbered, but not heard of: not reported for ever
    assert dict(routers.last_seqs) == {}
    assert routers.next_seq("a") == 4


def test_thousands_of_routers_that_come_and_go_leave_a_bounded_memory() -> None:
    routers = Routers(timeout_s=5.0, max_routers=8)
    for number in range(5000):
        name = f"router-{number}"
        pushed_out = routers.hear(name)
        routers.next_seq(name)
        if pushed_out:
            routers.forget(pushed_out)
        if number % 7 == 0:
            routers.forget(name)
            routers.next_seq(name)
        routers.tick(number / 100, listening=True)
    assert len(routers) <= 8
    assert routers.num_remembered <= 17

"""Which connections a draining router closes."""

from router.connections import Connections

GRACE_S = 5.0


def test_nothing_is_forsaken_before_the_draining() -> None:
    assert Connections[str]().forsaken(["a"], 1e9, GRACE_S) == []


def test_an_idle_one_is_kept_for_the_grace() -> None:
    connections = Connections[str]()
    connections.begin("a")
    connections.end("a", 10.0)
    connections.start_drain(100.0, ["a", "never asked"])
    assert connections.forsaken(["a", "never asked"], 104.9, GRACE_S) == []
    assert connections.forsaken(["a", "never asked"], 105.0, GRACE_S) == ["a", "never asked"]


def test_a_busy_one_is_kept_and_gets_the_grace_afterwards() -> None:
    """Its answer may have begun before the draining: the client does not know that it was the
    last one."""
    connections = Connections[str]()
    connections.begin("a")
    connections.start_drain(100.0, ["a"])
    assert connections.forsaken(["a"], 120.0, GRACE_S) == []
    connections.end("a", 120.0)
    assert connections.forsaken(["a"], 124.9, GRACE_S) == []
    assert connections.forsaken(["a"], 125.0, GRACE_S) == ["a"]


def test_one_that_comes_later_is_idle_since_then() -> None:
    """Its request is on the wire, perhaps, and shall get an answer."""
    connections = Connections[str]()
    connections.start_drain(100.0, [])
    assert connections.forsaken(["late"], 104.0, GRACE_S) == []
    assert connections.forsaken(["late"], 108.9, GRACE_S) == []
    assert connections.forsaken(["late"], 109.0, GRACE_S) == ["late"]

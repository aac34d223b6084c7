"""The subject tree: built and parsed in one place, and closed to injection."""

from collections.abc import Callable

import pytest

from protocol.errors import LocalError
from protocol.memory_bus import matches
from protocol.subjects import Subjects

S = Subjects("prod")


def test_the_tree() -> None:
    assert S.routers == "baton.prod.routers"
    assert S.api("chat.completions") == "baton.prod.api.chat.completions"
    assert S.jobs("w1", "i1") == "baton.prod.jobs.w1.i1"
    assert S.out("r1", "w1") == "baton.prod.out.r1.w1"
    assert S.gone("r1", "w1", "i1") == "baton.prod.out.r1.gone.w1.i1"
    assert S.events("w1") == "baton.prod.events.w1"


@pytest.mark.parametrize(
    ("pattern", "subject"),
    [
        (S.all_api, S.api("models")),
        (S.all_api, S.api("chat.completions")),
        (S.all_events, S.events("w1")),
        (S.out_all("r1"), S.out("r1", "w1")),
        (S.out_all("r1"), S.client("r1", "t1")),
        (S.out_all("r1"), S.gone("r1", "w1", "i1")),
    ],
)
def test_subscriptions_cover_their_subjects(pattern: str, subject: str) -> None:
    assert matches(pattern, subject)
    assert not matches(pattern, subject.replace("prod", "test"))


def test_one_router_does_not_hear_another() -> None:
    assert not matches(S.out_all("r1"), S.out("r2", "w1"))


def test_parsing() -> None:
    assert S.endpoint_of(S.api("chat.completions")) == "chat.completions"
    assert S.endpoint_of(S.routers) == ""
    assert S.gone_worker(S.gone("r1", "w1", "i1")) == ("w1", "i1")
    assert S.gone_worker(S.out("r1", "w1")) is None
    assert S.gone_worker(S.out("r1", "gone")) is None
    assert S.gone_worker("a.b.c.d.e.f.g") is None
    assert S.client_of(S.client("r1", "t1")) == "t1"
    assert S.client_of(S.gone("r1", "w1", "i1")) == S.client_of(S.out("r1", "client")) == ""
    assert S.client_of("a.b.c.d.e.f") == ""
    assert S.events_or_none("w1") == S.events("w1")
    assert S.events_or_none("w.1") is None


@pytest.mark.parametrize("bad", ["", "a.b", "*", ">", "a b", "a\r\nPUB x", "x" * 65])
@pytest.mark.parametrize(
    "build",
    [
        Subjects,
        S.events,
        S.out_all,
        lambda bad: S.jobs("w", bad),
        lambda bad: S.jobs(bad, "i"),
        lambda bad: S.out("r", bad),
        lambda bad: S.gone(bad, "w", "i"),
        lambda bad: S.gone("r", "w", bad),
        lambda bad: S.client("r", bad),
        lambda bad: S.api(f"chat.{bad}" if bad != "a.b" else "a..b"),
    ],
)
def test_no_name_can_reach_beyond_its_place(build: Callable[[str], object], bad: str) -> None:
    with pytest.raises(LocalError):
        build(bad)

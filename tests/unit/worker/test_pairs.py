"""What is remembered of the sources: the way their KV comes, said once, and what failed lately."""

import logging

import pytest

from worker.engine.pairs import MARK_S, Pairs, Way

SHM, TCP = Way("shm", "auto"), Way("tcp", "shm: failed before")


def test_a_way_is_said_once_and_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    pairs = Pairs()
    with caplog.at_level(logging.INFO, logger="baton.transfer"):
        for way in (SHM, SHM, TCP, TCP, SHM):
            pairs.used("p1", way)
    assert [record.getMessage() for record in caplog.records] == [
        "kv from=p1 transport=shm reason=auto",
        "kv from=p1 transport=tcp reason=shm: failed before",
        "kv from=p1 transport=shm reason=auto",
    ]
    assert pairs.ways() == {"p1": SHM}


def test_a_mark_is_of_one_incarnation_and_ends() -> None:
    pairs = Pairs()
    pairs.failed("p1", "a", "nixl", 10.0)
    pairs.failed("p1", "a", "shm", 11.0)
    assert pairs.failing("p1", "a", 12.0) == {"nixl", "shm"}
    assert pairs.failing("p1", "b", 12.0) == frozenset()
    assert pairs.failing("p1", "a", 10.0 + MARK_S) == {"shm"}
    pairs.failed("p1", "a", "shm", 40.5)
    assert pairs.failing("p1", "a", 11.0 + MARK_S) == {"shm"}
    assert pairs.failing("p1", "a", 40.5 + MARK_S) == frozenset()


def test_only_so_many_are_remembered() -> None:
    pairs = Pairs(max_sources=2)
    for source in ("p1", "p2", "p1", "p3"):
        pairs.used(source, SHM)
        pairs.failed(source, "a", "shm", 0.0)
    assert set(pairs.ways()) == {"p1", "p3"}
    assert pairs.failing("p2", "a", 1.0) == frozenset()

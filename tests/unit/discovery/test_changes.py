"""Differences between pictures of the fleet, and the roster that keeps the picture."""

from hypothesis import given
from hypothesis import strategies as st

from discovery.changes import (
    Change,
    Joined,
    Left,
    Roster,
    Updated,
    decode_worker,
    diff,
    encode_worker,
)
from protocol.worker_info import Capacity, KvLayout, WorkerInfo


def worker(worker_id: str, incarnation: str = "i1", *, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role="decode",
        model="m",
        model_digest="d",
        layout=KvLayout(block_size=16, block_bytes=1024),
        capacity=Capacity(num_blocks=8, max_running=4, max_context=128),
        engine="simulated",
        draining=draining,
    )


def applied(picture: dict[str, WorkerInfo], changes: list[Change]) -> dict[str, WorkerInfo]:
    after = dict(picture)
    for change in changes:
        if isinstance(change, Left):
            assert after.pop(change.info.worker_id) == change.info
        elif isinstance(change, Updated):
            assert after[change.info.worker_id] == change.before
            after[change.info.worker_id] = change.info
        else:
            assert change.info.worker_id not in after
            after[change.info.worker_id] = change.info
    return after


fleets = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.sampled_from(["i1", "i2"]), st.booleans())
).map(lambda d: {k: worker(k, i, draining=dr) for k, (i, dr) in d.items()})


@given(old=fleets, new=fleets)
def test_changes_turn_the_old_picture_into_the_new(
    old: dict[str, WorkerInfo], new: dict[str, WorkerInfo]
) -> None:
    assert applied(old, diff(old, new)) == new


def test_same_pictures_differ_in_nothing() -> None:
    assert diff({"a": worker("a")}, {"a": worker("a")}) == []


def test_new_incarnation_is_another_worker() -> None:
    old, new = worker("a", "i1"), worker("a", "i2")
    assert diff({"a": old}, {"a": new}) == [Left(old), Joined(new)]


def test_values_survive_the_round_trip_and_fields_of_the_future() -> None:
    value = encode_worker(worker("a"))
    assert decode_worker(value) == worker("a")
    assert decode_worker(value[:-1] + b',"of_the_future":{"x":[1]}}') == worker("a")


def test_unreadable_values_are_none() -> None:
    for value in (b"", b"{", b"[]", b'{"worker_id":1}', b"\xff\xfe", b'{"worker_id":"\xff"}'):
        assert decode_worker(value) is None


def test_roster_follows_listings_and_events() -> None:
    roster = Roster()
    assert roster.reset([("a", encode_worker(worker("a")))]) == [Joined(worker("a"))]
    assert roster.put("b", encode_worker(worker("b"))) == [Joined(worker("b"))]
    assert roster.put("b", encode_worker(worker("b"))) == []
    assert roster.put("b", encode_worker(worker("b", draining=True))) == [
        Updated(worker("b", draining=True), worker("b"))
    ]
    assert roster.delete("a") == [Left(worker("a"))]
    assert roster.delete("a") == []
    assert roster.workers == {"b": worker("b", draining=True)}
    assert roster.num_keys == 1
    assert roster.reset([]) == [Left(worker("b", draining=True))]


def test_unreadable_value_counts_as_absent_but_its_key_is_known() -> None:
    roster = Roster()
    roster.reset([("a", encode_worker(worker("a"))), ("b", b"junk")])
    assert roster.put("a", b"junk") == [Left(worker("a"))]
    assert (roster.num_keys, roster.num_unreadable_seen) == (2, 2)
    assert sorted(roster.unreadable) == ["a", "b"]
    assert roster.put("a", encode_worker(worker("a"))) == [Joined(worker("a"))]
    assert sorted(roster.unreadable) == ["b"]


def test_value_under_the_key_of_another_is_unreadable() -> None:
    roster = Roster()
    assert roster.put("a", encode_worker(worker("b"))) == []
    assert sorted(roster.unreadable) == ["a"]

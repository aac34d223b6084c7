"""Splitting and joining, without a bus and with a clock of our own."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.bus import Message
from protocol.errors import LocalError
from protocol.fragments import PART_HEADER, Headers, Joiner, header_bytes, split

LIMIT = 400


def messages(
    payload: bytes, part_id: str = "p.1", headers: Headers | None = None, reply: str = "re"
) -> list[Message]:
    parts = split(payload, headers, max_payload=LIMIT, part_id=part_id)
    replies = itertools.chain([reply], itertools.repeat(""))
    return [Message("s", part, re, h) for (part, h), re in zip(parts, replies, strict=False)]


def joiner(max_bytes: int = 1 << 20, max_joins: int = 1024) -> Joiner:
    return Joiner(max_bytes=max_bytes, max_joins=max_joins)


def test_header_bytes_is_what_the_wire_takes() -> None:
    assert header_bytes(None) == header_bytes({}) == 0
    assert header_bytes({"Ab": "é"}) == len("NATS/1.0\r\nAb: é\r\n\r\n".encode())


@given(st.binary(max_size=5000), st.none() | st.dictionaries(st.just("Key"), st.text(max_size=20)))
def test_every_part_fits_and_all_together_are_the_payload(
    payload: bytes, headers: dict[str, str] | None
) -> None:
    parts = split(payload, headers, max_payload=LIMIT, part_id="x" * 40)
    assert all(len(part) + header_bytes(h) <= LIMIT for part, h in parts)
    assert b"".join(part for part, _ in parts) == payload
    whole = len(payload) + header_bytes(headers) <= LIMIT
    assert (len(parts) == 1 and PART_HEADER not in (parts[0][1] or {})) == whole


def test_headers_that_leave_no_room_are_our_own_mistake() -> None:
    with pytest.raises(LocalError, match="cannot be split"):
        split(b"x", {"Key": "v" * LIMIT}, max_payload=LIMIT, part_id="a")


@given(st.binary(max_size=5000))
def test_joined_is_what_was_split(payload: bytes) -> None:
    join = joiner()
    headers = {"Key": "v"}
    results = [join.add(message, 0.0) for message in messages(payload, headers=headers)]
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] == Message("s", payload, "re", headers)
    assert (len(join), join.held_bytes, join.lost) == (0, 0, 0)


def test_payloads_of_many_senders_may_interleave() -> None:
    join = joiner()
    streams = [messages(bytes([n]) * 2000, f"p.{n}") for n in range(5)]
    order = [n for n, stream in enumerate(streams) for _ in stream]
    random.Random(1).shuffle(order)
    done = [join.add(streams[n].pop(0), 0.0) for n in order]
    whole = sorted(message.payload for message in done if message is not None)
    assert whole == [bytes([n]) * 2000 for n in range(5)]
    assert join.lost == 0


@given(st.data())
def test_a_missing_part_loses_its_payload_once_and_harms_no_other(data: st.DataObject) -> None:
    join = joiner()
    parts = messages(b"a" * 3000)
    missing = data.draw(st.integers(0, len(parts) - 1))
    for part in parts[:missing] + parts[missing + 1 :]:
        assert join.add(part, 0.0) is None
    join.expire(30.0)
    assert (join.lost, join.held_bytes, len(join)) == (1, 0, 0)
    other = [join.add(part, 30.0) for part in messages(b"b" * 3000, "p.2")][-1]
    assert other is not None
    assert other.payload == b"b" * 3000


def test_a_repeated_part_is_not_joined_twice() -> None:
    join, parts = joiner(), messages(b"a" * 3000)
    for part in (parts[0], parts[0], *parts[1:]):
        assert join.add(part, 0.0) is None
    assert join.lost == 1


def test_silence_ends_a_join_and_sound_keeps_it() -> None:
    join = joiner()
    old, kept = messages(b"a" * 3000, "old"), messages(b"b" * 3000, "kept")
    join.add(old[0], 0.0)
    join.add(kept[0], 1.0)
    join.add(kept[1], 25.0)
    join.expire(29.9)
    assert join.lost == 0
    join.expire(31.0)
    assert (join.lost, len(join)) == (1, 1)
    assert [join.add(part, 50.0) for part in kept[2:]][-1] is not None


def test_bytes_in_joins_are_bounded_and_the_oldest_goes() -> None:
    join = joiner(max_bytes=3000)
    one, two = messages(b"a" * 2500, "one"), messages(b"b" * 2500, "two")
    for part in one[:-1] + two[:-1]:
        join.add(part, 0.0)
        assert join.held_bytes <= 3000
    assert join.lost == 1
    assert join.add(one[-1], 0.0) is None
    assert join.add(two[-1], 0.0) is not None
    assert (join.lost, join.held_bytes, len(join)) == (1, 0, 0)


def test_a_payload_beyond_the_bound_is_lost_alone() -> None:
    join = joiner(max_bytes=1000)
    assert [join.add(part, 0.0) for part in messages(b"a" * 5000)][-1] is None
    assert (join.lost, join.held_bytes, len(join)) == (1, 0, 0)


def test_the_number_of_joins_is_bounded() -> None:
    join = joiner(max_joins=3)
    for number in range(10):
        join.add(messages(b"a" * 3000, f"p.{number}")[0], 0.0)
    assert (len(join), join.lost) == (3, 7)


def test_what_never_was_a_part_passes() -> None:
    join = joiner()
    for headers in (None, {"Key": "v"}):
        message = Message("s", b"x", "", headers)
        assert join.add(message, 0.0) is message


@pytest.mark.parametrize(
    "text",
    ["", "a", "a 0", "a 1 1", "a 0 0", "a 0 1000001", "a!b 0 2", " a 0 2", "a ٣ 4", "a 0 2 "],
)
def test_rubbish_is_counted(text: str) -> None:
    join = joiner()
    assert join.add(Message("s", b"x", "", {PART_HEADER: text}), 0.0) is None
    assert (join.lost, len(join)) == (1, 0)

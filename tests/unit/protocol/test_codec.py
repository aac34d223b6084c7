"""The bytes of the wire: every message round-trips, old bytes decode for ever, rubbish is refused.

`BATON_WRITE_GOLDEN=1` writes the golden file of this version if there is none yet; the file of a
released version is never written again. A new example goes behind the others: numbers are names.
"""

import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec
from protocol.errors import BadMessage
from protocol.events import Beat, EventEnvelope, KvEvent, KvSnapshot, WorkerEvent
from protocol.handoff import Offer
from protocol.jobs import Job, JobEnvelope, Pong, Prompt
from protocol.out import Out, OutEnvelope
from protocol.worker_info import WorkerInfo
from tests.unit.protocol.wire_examples import ENVELOPES, any_of, examples

FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = FOLDER / "v0_2_0.json"
DECODERS: dict[type[Any], Callable[[bytes], Any]] = {
    JobEnvelope: codec.decode_jobs,
    OutEnvelope: codec.decode_out,
    EventEnvelope: codec.decode_events,
    Beat: codec.decode_beat,
    Pong: codec.decode_pong,
    KvSnapshot: codec.decode_snapshot,
    WorkerInfo: codec.decode_info,
}
EXAMPLES = examples()


def encoded(message: Any) -> bytes:
    return codec.encode_info(message) if isinstance(message, WorkerInfo) else codec.encode(message)


def decoded(kind: type[Any], data: bytes) -> Any:
    return DECODERS[kind](data)


@pytest.mark.parametrize("kind", ENVELOPES, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Any]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(any_of(kind))
    def survives(message: Any) -> None:
        assert decoded(kind, encoded(message)) == message

    survives()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_survive_the_wire(name: str) -> None:
    message = EXAMPLES[name]
    assert decoded(type(message), encoded(message)) == message


def test_there_is_an_example_of_every_message() -> None:
    unions = [Job, Out, WorkerEvent, KvEvent, Offer, Prompt]
    wanted = {kind for union in unions for kind in typing.get_args(union)} | set(ENVELOPES)
    assert wanted - seen_types(list(EXAMPLES.values())) == set()


def seen_types(value: Any) -> set[type[Any]]:
    if isinstance(value, list):
        return set().union(*map(seen_types, value))
    if isinstance(value, msgspec.Struct):
        inner = [getattr(value, name) for name in value.__struct_fields__]
        return {type(value)} | seen_types(inner)
    return set()


def golden_bytes(path: Path) -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_bytes_of_every_version_decode_for_ever(path: Path) -> None:
    for name, data in golden_bytes(path).items():
        assert decoded(type(EXAMPLES[name]), data) == EXAMPLES[name], name


def test_the_golden_bytes_of_this_version_are_what_we_say() -> None:
    if os.environ.get("BATON_WRITE_GOLDEN") and not GOLDEN.exists():
        lines = {name: encoded(message).hex() for name, message in EXAMPLES.items()}
        GOLDEN.write_text(json.dumps(lines, indent=1) + "\n")
    golden = golden_bytes(GOLDEN)
    assert golden.keys() == EXAMPLES.keys()
    for name, data in golden.items():
        assert encoded(EXAMPLES[name]) == data, name


def test_fields_that_a_newer_version_appends_are_ignored() -> None:
    plain = msgspec.msgpack.decode(codec.encode(Beat("r1", True)))
    assert codec.decode_beat(msgspec.msgpack.encode([*plain, "new"])) == Beat("r1", True)
    assert codec.decode_beat(msgspec.msgpack.encode(plain[:1])) == Beat("r1", False)
    info = json.loads(codec.encode_info(EXAMPLES["info"]))  # type: ignore[arg-type]
    assert codec.decode_info(json.dumps({**info, "new": [1]}).encode()) == EXAMPLES["info"]


def is_refused_or_whole(kind: type[Any], data: bytes) -> None:
    try:
        message = decoded(kind, data)
    except BadMessage:
        return
    assert isinstance(message, kind)


@given(st.sampled_from(ENVELOPES), st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_a_bad_message_at_worst(kind: type[Any], data: bytes) -> None:
    is_refused_or_whole(kind, data)


@given(st.sampled_from(sorted(EXAMPLES)), st.data())
@settings(max_examples=500, deadline=None)
def test_damaged_messages_are_a_bad_message_at_worst(name: str, data: st.DataObject) -> None:
    good = encoded(EXAMPLES[name])
    at = data.draw(st.integers(0, len(good) - 1))
    noise = data.draw(st.binary(max_size=4))
    for kind in (type(EXAMPLES[name]), Pong, JobEnvelope):
        is_refused_or_whole(kind, good[:at] + noise + good[at + len(noise) :])


@pytest.mark.parametrize("name", EXAMPLES)
def test_truncated_messages_are_refused(name: str) -> None:
    good = encoded(EXAMPLES[name])
    for length in range(len(good)):
        with pytest.raises(BadMessage):
            decoded(type(EXAMPLES[name]), good[:length])
    with pytest.raises(BadMessage):
        decoded(type(EXAMPLES[name]), good + b"\x00")


@pytest.mark.parametrize("kind", ENVELOPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 100_000,
        b"[" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x92\xdb\xff\xff\xff\xff",
        b"\x92\xa2\xff\xfe\x90",
        b"\xc1",
        b"\x93\xa1w\xa1i\x93\xff\xff",
    ],
    ids=range(9),
)
def test_hostile_bytes_are_refused(kind: type[Any], data: bytes) -> None:
    with pytest.raises(BadMessage):
        decoded(kind, data)


def test_a_message_of_another_mailbox_is_refused() -> None:
    with pytest.raises(BadMessage):
        codec.decode_jobs(codec.encode(EXAMPLES["out/0/Accepted"]))  # type: ignore[arg-type]
    with pytest.raises(BadMessage):
        codec.decode_out(codec.encode(EXAMPLES["jobs/0/Prefill"]))  # type: ignore[arg-type]


def test_builtins_are_for_people() -> None:
    assert codec.as_builtins(Beat("r1")) == ["r1", False, False]
    assert codec.as_builtins(EXAMPLES["info"])["worker_id"] == "w1"

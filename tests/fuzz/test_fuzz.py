"""A bounded run of the fuzzer, bombs, and what must come back as it went."""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.changes import decode_worker
from protocol import codec
from protocol.bus import Message
from protocol.errors import BadMessage
from protocol.fragments import Joiner, split
from protocol.worker_info import WorkerInfo, problem
from tests.fuzz.decoders import DECODERS, Decoder
from tests.fuzz.mutations import LENGTH_BOMBS, MAX_INPUT, blind, bombs, structured
from tests.fuzz.running import MEMORY_BASE, fuzz, hungry, inputs_of
from tests.unit.protocol.wire_examples import INFO, any_of, examples
from worker.transfer.tcp_wire import Request, decode_request, encode_request

COUNTS = {
    "front": 300, "config": 50, "text.tokenizer": 40, "text.generation": 40, "text.template": 30,
    "engine.grammar": 60, "engine.weights": 500, "vllm.handle": 400, "vllm.kv_frames": 500,
}  # fmt: skip
"""Inputs of those that take long for each; the others get `COUNT`."""
COUNT = 3000
IDS = [decoder.name for decoder in DECODERS]


def _count(decoder: Decoder) -> int:
    return next((n for name, n in COUNTS.items() if decoder.name.startswith(name)), COUNT)


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic that is taken as it should be writes a page all the same."""
    monkeypatch.setenv("RUST_BACKTRACE", "0")


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("decoder", DECODERS, ids=IDS)
def test_what_others_wrote_is_taken_or_refused_by_its_own_error(decoder: Decoder) -> None:
    result = fuzz(decoder, seed=9, count=_count(decoder))
    assert result.bad == []
    assert result.inputs >= _count(decoder)
    assert result.accepted


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "decoder", [d for d in DECODERS if d.form in ("msgpack", "bytes")],
    ids=[d.name for d in DECODERS if d.form in ("msgpack", "bytes")],
)  # fmt: skip
def test_a_promised_length_is_not_believed(decoder: Decoder) -> None:
    assert hungry(decoder) == []


# -- the fuzzer itself


def test_a_run_is_the_same_again() -> None:
    for decoder in DECODERS[:3]:
        first, second = (inputs_of(decoder, random.Random(5)) for _ in range(2))
        assert [next(first) for _ in range(200)] == [next(second) for _ in range(200)]


def test_mutations_are_bounded_and_change_something() -> None:
    rng = random.Random(1)
    valid = codec.encode(examples()["jobs/2/Decode"])  # type: ignore[arg-type]
    made = [blind(valid, rng, [valid]) for _ in range(500)]
    made += [other for _ in range(500) if (other := structured(valid, "msgpack", rng))]
    assert all(len(data) <= MAX_INPUT for data in made)
    assert len(set(made)) > 700
    assert any(LENGTH_BOMBS[0] in data for data in bombs(valid))


class _Bad(Exception):
    pass


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(ValueError("x"), "ValueError"), (RecursionError("deep"), "RecursionError"),
     (type("PanicException", (BaseException,), {})("rust"), "PanicException")],
)  # fmt: skip
def test_a_decoder_that_raises_anything_else_is_found(fault: BaseException, kind: str) -> None:
    def decode(data: bytes) -> bytes:
        if len(data) % 7 == 3:
            raise fault
        return data

    result = fuzz(Decoder("bad", decode, lambda: [b"abcd"], (_Bad,)), seed=1, count=200)
    assert set(result.kinds) == {kind}
    assert len(result.bad) <= 3


def test_a_decoder_that_believes_a_length_is_found() -> None:
    def decode(data: bytes) -> bytes:
        return bytes(8 * MEMORY_BASE) if data.startswith(b"\xdd\xff") else data

    assert hungry(Decoder("hungry", decode, lambda: [b"abcd"], ()))


def test_a_decoder_that_refuses_our_own_bytes_is_found() -> None:
    def decode(_data: bytes) -> None:
        raise _Bad

    result = fuzz(Decoder("strict", decode, lambda: [b"a", b"b"], (_Bad,)), seed=1, count=5)
    assert set(result.kinds) == {"refused"}


# -- properties


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=5000), st.integers(150, 900), st.data())
def test_parts_come_together_in_order_and_no_other_way(
    payload: bytes, max_payload: int, data: st.DataObject
) -> None:
    parts = split(payload, {"k": "v"}, max_payload=max_payload, part_id="id.1")
    messages = [Message("s", piece, headers=headers) for piece, headers in parts]
    order = data.draw(st.permutations(range(len(messages))) | st.just(list(range(len(messages)))))
    joined = _join([messages[at] for at in order])
    if list(order) == sorted(order):
        assert joined == [payload]
    elif len(messages) > 1:
        assert joined == []


def _join(messages: Sequence[Message]) -> list[bytes]:
    joiner = Joiner(max_bytes=1 << 20)
    whole = [joiner.add(message, 0.0) for message in messages]
    return [message.payload for message in whole if message is not None]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_a_tcp_request_comes_back(slot: int, count: int, nonce: int) -> None:
    request = Request(slot, count, nonce, 8192)
    assert decode_request(encode_request(request)) == request


@settings(max_examples=150, deadline=None)
@given(any_of(WorkerInfo))
def test_a_worker_in_the_registry_is_itself_or_nobody(info: WorkerInfo) -> None:
    """What is taken can be given a subject, a block has tokens, and nothing is negative."""
    value = codec.encode_info(info)
    assert decode_worker(value) == (None if problem(info) else info)


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": "a.b"}, {"worker_id": ""}, {"incarnation": "*"}, {"incarnation": "x" * 65},
        {"model": ""}, {"model": "m" * 5000}, {"model_digest": "d" * 5000},
        {"layout": msgspec.structs.replace(INFO.layout, block_size=0)},
        {"layout": msgspec.structs.replace(INFO.layout, block_bytes=-1)},
        {"capacity": msgspec.structs.replace(INFO.capacity, num_blocks=-5)},
        {"capacity": msgspec.structs.replace(INFO.capacity, max_running=0)},
        {"capacity": msgspec.structs.replace(INFO.capacity, max_context=2**63)},
    ],
)  # fmt: skip
def test_a_worker_that_cannot_be_is_as_if_it_were_not_there(change: dict[str, Any]) -> None:
    assert decode_worker(codec.encode_info(INFO)) == INFO
    assert decode_worker(codec.encode_info(msgspec.structs.replace(INFO, **change))) is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.sampled_from(LENGTH_BOMBS), st.sampled_from(sorted(examples())))
def test_a_message_with_something_behind_it_is_none(rest: bytes, name: str) -> None:
    message = examples()[name]
    if isinstance(message, WorkerInfo) or not rest:
        return
    kind = name.partition("/")[0]
    with pytest.raises(BadMessage):
        getattr(codec, f"decode_{kind}")(codec.encode(message) + rest)  # type: ignore[arg-type]

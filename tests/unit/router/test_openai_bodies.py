import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ClientError
from protocol.openai import (
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    decode_chat,
    decode_completion,
)
from protocol.sampling import Sampling
from router.grammar_options import grammar_of
from router.sampling_options import Defaults, resolve


def completion(**fields: Any) -> CompletionRequest:
    return decode_completion(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return decode_chat(json.dumps({"model": "m", "messages": [], **fields}).encode())


def test_unknown_fields_are_ignored_and_null_is_absence() -> None:
    request = completion(user="me", foo={"bar": [1]}, temperature=None, stop=None, logprobs=None)
    assert (request.temperature, request.stop, request.logprobs) == (None, None, None)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_asks_for_nothing_is_accepted(name: str) -> None:
    is_chat = name in ChatRequest.__struct_fields__
    for value in (None, *UNSUPPORTED[name]):
        chat(**{name: value}) if is_chat else completion(**{name: value})


WANTED: list[tuple[str, Any]] = [
    ("guided_regex", "a"),
    ("guided_choice", ["a"]),
    ("guided_grammar", "a"),
    ("prompt_logprobs", 0),
    ("use_beam_search", True),
    ("tools", [{}]),
    ("tool_choice", "required"),
    ("functions", [{}]),
    ("function_call", {"name": "f"}),
    ("modalities", ["text", "audio"]),
    ("audio", {}),
    ("chat_template", "{{ messages }}"),
    ("continue_final_message", True),
    ("suffix", "x"),
]


@pytest.mark.parametrize(("name", "value"), WANTED, ids=[name for name, _ in WANTED])
def test_what_we_know_and_lack_is_named(name: str, value: Any) -> None:
    decode = chat if name in ChatRequest.__struct_fields__ else completion
    with pytest.raises(ClientError) as error:
        decode(**{name: value})
    assert (error.value.status, error.value.code) == (400, "unsupported_parameter")
    assert error.value.param == name
    assert name in error.value.message


def test_every_unsupported_field_is_tried() -> None:
    assert {name for name, _ in WANTED} == set(UNSUPPORTED)


def test_zero_is_not_false_and_one_is_not_true() -> None:
    """Python takes the two for equal."""
    with pytest.raises(ClientError, match="use_beam_search"):
        completion(use_beam_search=0)
    with pytest.raises(ClientError, match="logprobs"):
        completion(logprobs=True)
    with pytest.raises(ClientError, match="logprobs"):
        chat(logprobs=1)
    assert completion(logprobs=0).logprobs == 0
    assert chat(logprobs=False).logprobs is False


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"\xff", "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b'{"prompt":"\\ud800"}', "invalid_json", None),
        (b'{"prompt":"p","temperature":NaN}', "invalid_json", None),
        (b'{"prompt":"p","max_tokens":"x"}', "invalid_type", "max_tokens"),
        (b'{"prompt":[[1,"a"]]}', "invalid_type", "prompt[0][1]"),
        (b"{}", "missing_parameter", "prompt"),
        (b'{"prompt":"p","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_bodies_say_where(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(ClientError) as error:
        decode_completion(body)
    assert (error.value.status, error.value.code, error.value.param) == (400, code, param)
    assert error.value.body("rid") == {
        "error": {
            "message": f"{error.value.message} (request rid)",
            "type": "invalid_request_error",
            "param": param,
            "code": code,
        }
    }


def status_of(decode: Callable[[bytes], object], body: bytes) -> int:
    try:
        decode(body)
    except ClientError as error:
        return error.status
    return 200


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_a_request_or_a_client_error(body: bytes) -> None:
    for decode in (decode_chat, decode_completion):
        assert status_of(decode, body) in (200, 400)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})


def read_chat(body: bytes) -> Sampling:
    request = decode_chat(body)
    return resolve(request, Defaults(), 300, grammar_of(request)[0])


def read_completion(body: bytes) -> Sampling:
    request = decode_completion(body)
    return resolve(request, Defaults(), 300, grammar_of(request)[0])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_any_json_is_a_request_or_a_client_error(fields: dict[str, Any]) -> None:
    for base, read in (({"messages": []}, read_chat), ({"prompt": "p"}, read_completion)):
        body = json.dumps({**base, **fields}).encode()
        assert status_of(read, body) in (200, 400)


SCHEMAS = st.recursive(
    VALUES,
    lambda inner: st.dictionaries(
        st.sampled_from(["type", "json_schema", "schema", "name", "json", "json_object"]),
        inner | st.sampled_from(["text", "json_object", "json_schema"]),
        max_size=4,
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.sampled_from(["response_format", "structured_outputs", "guided_json"]), SCHEMAS)
def test_any_format_is_a_schema_or_a_client_error(name: str, value: Any) -> None:
    body = json.dumps({"prompt": "p", name: value}).encode()
    assert status_of(read_completion, body) in (200, 400)

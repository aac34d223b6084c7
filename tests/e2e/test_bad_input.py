"""Whatever a client sends: the right status, OpenAI's error object, soon, and a fleet as before."""

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.fleet import MODEL, Fleet

pytestmark = pytest.mark.xdist_group("api")

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
LONG_MESSAGES = [{"role": "user", "content": "x" * 200_000}]
UNSUPPORTED = "unsupported_parameter"


@pytest.fixture(autouse=True)
def _idle_afterwards(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.until_idle()


def post(
    fleet: Fleet, path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers (lower case) and JSON, within a second."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(fleet, "POST", path, data, headers)


def call(
    fleet: Fleet,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    port: int | None = None,
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port or fleet.port, timeout=5)
    try:
        began = time.monotonic()
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        assert time.monotonic() - began < 1.0
    finally:
        connection.close()
    has = {key.lower(): value for key, value in response.getheaders()}
    return response.status, has, json.loads(data) if data else None


def error_of(answer: tuple[int, dict[str, str], Any]) -> dict[str, Any]:
    """The error object, after checking all that every error has."""
    status, headers, body = answer
    assert status >= 400
    assert headers["content-type"].startswith("application/json")
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert headers["x-request-id"] in error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    return error


BAD_BODIES = {
    "empty": (b"", "invalid_json"),
    "no_json": (b"hello", "invalid_json"),
    "cut": (b'{"model": "demo", "prompt": "a', "invalid_json"),
    "trailing": (b'{"model": "demo", "prompt": "a"} x', "invalid_json"),
    "array": (b"[]", "invalid_type"),
    "null": (b"null", "invalid_type"),
    "number": (b"7", "invalid_type"),
    "utf8": (b'{"model": "demo", "prompt": "\xff\xfe"}', "invalid_json"),
    "surrogate": (b'{"model": "demo", "prompt": "\\ud800"}', "invalid_json"),
    "surrogate_pair_cut": (b'{"model": "demo", "prompt": "\\ud83dx"}', "invalid_json"),
    "nan": (b'{"model": "demo", "prompt": "a", "temperature": NaN}', "invalid_json"),
    "infinity": (b'{"model": "demo", "prompt": "a", "temperature": Infinity}', "invalid_json"),
    "overflow": (b'{"model": "demo", "prompt": "a", "temperature": 1e999}', "invalid_type"),
    "deep": (b'{"model": "demo", "x": ' + b"[" * 200_000, "invalid_json"),
    "deep_prompt": (b'{"model": "demo", "prompt": ' + b"[" * 200_000, "invalid_type"),
    "zeros": (bytes(1000), "invalid_json"),
    "random": (random.Random(5).randbytes(5000), "invalid_json"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_no_request(fleet: Fleet, name: str) -> None:
    body, code = BAD_BODIES[name]
    answer = post(fleet, TEXT, body)
    assert answer[0] == 400
    assert error_of(answer)["code"] == code


SCHEMA_AT = "response_format.json_schema"
DEEP = json.loads("[" * 99 + "]" * 99)


def schema_format(schema: Any) -> dict[str, Any]:
    inner = {"name": "n", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    # path, fields, param, code
    (TEXT, {"model": None}, "model", "missing_parameter"),
    (TEXT, {"model": ""}, "model", "missing_parameter"),
    (TEXT, {"model": 5}, "model", "invalid_type"),
    (TEXT, {"prompt": 5}, "prompt", "invalid_type"),
    (TEXT, {"prompt": None}, "prompt", "invalid_type"),
    (TEXT, {"prompt": []}, "prompt", "invalid_value"),
    (TEXT, {"prompt": [[]]}, "prompt", "invalid_value"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "invalid_type"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", "invalid_type"),
    (TEXT, {"prompt": [-1]}, "prompt", "invalid_value"),
    (TEXT, {"prompt": [2**70]}, "prompt", "invalid_value"),
    (TEXT, {"prompt": [1.5]}, "prompt[0]", "invalid_type"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "invalid_type"),
    (TEXT, {"prompt": "x" * 200_000}, "prompt", "context_length_exceeded"),
    (TEXT, {"prompt": ["x"] * 5000}, "n", "too_many_choices"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (TEXT, {"max_tokens": -1}, "max_tokens", "invalid_value"),
    (TEXT, {"max_tokens": 10**7}, "max_tokens", "context_length_exceeded"),
    (TEXT, {"max_tokens": 10**40}, "max_tokens", "context_length_exceeded"),
    (TEXT, {"max_tokens": "5"}, "max_tokens", "invalid_type"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    (TEXT, {"temperature": -0.1}, "temperature", "invalid_value"),
    (TEXT, {"temperature": 2.1}, "temperature", "invalid_value"),
    (TEXT, {"temperature": "hot"}, "temperature", "invalid_type"),
    (TEXT, {"top_p": 0}, "top_p", "invalid_value"),
    (TEXT, {"top_p": 1.1}, "top_p", "invalid_value"),
    (TEXT, {"top_k": -2}, "top_k", "invalid_value"),
    (TEXT, {"top_k": 10**30}, "top_k", "invalid_value"),
    (TEXT, {"n": 0}, "n", "invalid_value"),
    (TEXT, {"n": -5}, "n", "invalid_value"),
    (TEXT, {"n": 10**9}, "n", "invalid_value"),
    (TEXT, {"n": True}, "n", "invalid_type"),
    (TEXT, {"stop": 5}, "stop", "invalid_type"),
    (TEXT, {"stop": [""]}, "stop", "invalid_value"),
    (TEXT, {"stop": ["x"] * 17}, "stop", "invalid_value"),
    (TEXT, {"stop": "x" * 2000}, "stop", "invalid_value"),
    (TEXT, {"stop_token_ids": [2**70]}, "stop_token_ids", "invalid_value"),
    (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    (TEXT, {"min_tokens": 50, "max_tokens": 5}, "min_tokens", "invalid_value"),
    (TEXT, {"cache_salt": "x" * 10_000}, "cache_salt", "invalid_value"),
    (TEXT, {"stream": "yes"}, "stream", "invalid_type"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (TEXT, {"stream": True, "stream_options": 5}, "stream_options", "invalid_type"),
    (TEXT, {"seed": 1.5}, "seed", "invalid_type"),
    (TEXT, {"logprobs": -1}, "logprobs", "invalid_value"),
    (TEXT, {"logprobs": 21}, "logprobs", "invalid_value"),
    (TEXT, {"logprobs": True}, "logprobs", "invalid_type"),
    (TEXT, {"max_tokens": 0, "logprobs": 1}, "max_tokens", "invalid_value"),
    (TEXT, {"max_tokens": -1, "echo": True}, "max_tokens", "invalid_value"),
    (TEXT, {"echo": "yes"}, "echo", "invalid_type"),
    (TEXT, {"prompt": "x" * 200_000, "echo": True}, "prompt", "context_length_exceeded"),
    (TEXT, {"suffix": "x"}, "suffix", UNSUPPORTED),
    (TEXT, {"prompt_logprobs": 1}, "prompt_logprobs", UNSUPPORTED),
    (TEXT, {"best_of": 3}, "best_of", "invalid_value"),
    (TEXT, {"min_p": 1.1}, "min_p", "invalid_value"),
    (TEXT, {"min_p": "x"}, "min_p", "invalid_type"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    (TEXT, {"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    (TEXT, {"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
    (TEXT, {"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
    (TEXT, {"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    (TEXT, {"logit_bias": {"5": "x"}}, "logit_bias[...]", "invalid_type"),
    (TEXT, {"logit_bias": [5]}, "logit_bias", "invalid_type"),
    (CHAT, {"logprobs": 1}, "logprobs", "invalid_type"),
    (CHAT, {"logprobs": False, "top_logprobs": 3}, "top_logprobs", "invalid_value"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", UNSUPPORTED),
    (CHAT, {"tool_choice": "required"}, "tool_choice", UNSUPPORTED),
    (CHAT, {"functions": [{}]}, "functions", UNSUPPORTED),
    (CHAT, {"response_format": "json"}, "response_format", "invalid_type"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (CHAT, {"response_format": {"type": "json_schema"}}, SCHEMA_AT, "missing_parameter"),
    (CHAT, schema_format(5), f"{SCHEMA_AT}.schema", "invalid_type"),
    (CHAT, schema_format({"enum": ["x" * 70_000]}), f"{SCHEMA_AT}.schema", "invalid_value"),
    (CHAT, schema_format(DEEP), f"{SCHEMA_AT}.schema", "invalid_type"),
    (CHAT, schema_format({"not": DEEP}), f"{SCHEMA_AT}.schema", "invalid_value"),
    (CHAT, schema_format({"type": "no such type"}), "response_format", "invalid_request"),
    (CHAT, {"guided_json": "{"}, "guided_json", "invalid_json"),
    (CHAT, {"guided_regex": "a*"}, "guided_regex", UNSUPPORTED),
    (CHAT, {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", UNSUPPORTED),
    (CHAT, {"continue_final_message": True}, "continue_final_message", UNSUPPORTED),
    (CHAT, {"modalities": ["audio"]}, "modalities", UNSUPPORTED),
    (CHAT, {"messages": []}, "messages", "invalid_messages"),
    (CHAT, {"messages": {}}, "messages", "invalid_type"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "invalid_type"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "invalid_messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_messages"),
    (CHAT, {"messages": [{"role": "u", "content": 5}]}, "messages[0].content", "invalid_messages"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    (CHAT, {"messages": LONG_MESSAGES}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("path", "fields", "param", "code"), BAD_FIELDS, ids=lambda v: str(v)[:40])
def test_bad_fields_are_named(
    fleet: Fleet, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    asked = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
    answer = post(fleet, path, {"model": MODEL, **asked, "max_tokens": 2, **fields})
    error = error_of(answer)
    assert (answer[0], error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
def test_missing_fields_are_named(fleet: Fleet, path: str, param: str) -> None:
    error = error_of(post(fleet, path, {"model": MODEL}))
    assert (error["code"], error["param"]) == ("missing_parameter", param)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404(fleet: Fleet, stream: bool) -> None:
    body = {"model": "no/such", "messages": MESSAGES, "stream": stream}
    answer = post(fleet, CHAT, body)
    error = error_of(answer)
    assert (answer[0], error["code"], error["param"]) == (404, "model_not_found", "model")


def test_what_means_nothing_or_is_not_known_is_ignored(fleet: Fleet) -> None:
    neutral: dict[str, Any] = {
        "temperature": None, "n": None, "stop": None, "logprobs": False, "top_logprobs": 0,
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me",
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "store": True,
        "repetition_penalty": 1, "min_p": 0, "structured_outputs": None, "guided_json": None,
        "stream_options": None, "x_unknown": {"deep": [1, 2, {"a": None}]}, "metadata": {},
    }  # fmt: skip
    status, _, body = post(
        fleet, CHAT, {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **neutral}
    )
    assert status == 200, body
    extras = {"echo": False, "suffix": "", "best_of": 1, "max_tokens": 2}
    status, _, body = post(fleet, TEXT, {"model": MODEL, "prompt": "a", **extras})
    assert status == 200, body


def test_hostile_template_arguments_only_fail_themselves(fleet: Fleet) -> None:
    kwargs: dict[str, Any] = {"messages": "mine", "self": 1, "loop": "x" * 9, "tools": [1]}
    kwargs["deep"] = json.loads("[" * 500 + "]" * 500)
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "chat_template_kwargs": kwargs}
    assert post(fleet, CHAT, body)[0] in (200, 400)


def test_a_body_over_the_limit_is_refused_while_it_comes(fleet: Fleet) -> None:
    answer = post(fleet, TEXT, b'{"prompt": "' + b"x" * 50_000_000 + b'"}')
    error = error_of(answer)
    assert (answer[0], error["code"]) == (413, "body_too_large")


def test_a_chunked_body_over_the_limit_is_refused(fleet: Fleet) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=5)
    part = b"x" * 1_000_000
    try:
        connection.request("POST", TEXT, iter([part] * 40), encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "body_too_large"
    finally:
        connection.close()


def raw(fleet: Fleet, data: bytes, *, until: bytes = b"", port: int | None = None) -> bytes:
    """What comes back on a plain connection, up to `until` or to its end."""
    with socket.create_connection(("127.0.0.1", port or fleet.port), timeout=3) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
            if until and until in received:
                break
        return received


def test_broken_chunks_are_a_400(fleet: Fleet) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    received = raw(fleet, head + b"5\r\nhello\r\nzzzz\r\n")
    assert received.partition(b" ")[2].startswith(b"400")


def test_a_broken_gzip_body_is_a_400(fleet: Fleet) -> None:
    answer = post(fleet, TEXT, b"\x1f\x8bnonsense", {"Content-Encoding": "gzip"})
    assert answer[0] == 400


def test_expect_100_continue(fleet: Fleet) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=3) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    received = raw(fleet, f"{head}Content-Length: 99000000\r\n\r\n".encode(), until=b"}}")
    assert received.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in received
    odd = head.replace("100-continue", "miracles")
    for asked in (
        odd,
        odd.replace(f"POST {TEXT}", "GET /v1/models"),
        odd.replace(f"POST {TEXT}", "GET /live"),
    ):
        received = raw(fleet, asked.encode() + b"\r\n")
        assert received.startswith(b"HTTP/1.1 417")
        assert b'"code":"expectation"' in received
        assert b"x-request-id:" in received.lower()


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_1_0_client_gets_no_chunks_and_a_close(fleet: Fleet, stream: bool) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": stream}).encode()
    head = f"POST {TEXT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    received_head, _, payload = raw(fleet, head + body).partition(b"\r\n\r\n")
    assert received_head.startswith(b"HTTP/1.0 200")
    assert b"transfer-encoding" not in received_head.lower()
    if stream:
        assert payload.startswith(b"data: {")
        assert payload.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(payload)["usage"]["completion_tokens"] == 3


def test_methods_and_paths(fleet: Fleet) -> None:
    answer = call(fleet, "GET", CHAT)
    assert (answer[0], answer[1]["allow"]) == (405, "POST")
    assert error_of(answer)["code"] == "method_not_allowed"
    answer = call(fleet, "DELETE", "/v1/models")
    assert answer[0] == 405
    for path in ("/", "/v1/nothing", "/v1/chat", "/v1/models/", "/..%2f..%2fetc/passwd"):
        answer = call(fleet, "GET", path)
        assert answer[0] == 404
        assert error_of(answer)["type"] == "not_found_error"
    assert call(fleet, "HEAD", "/v1/models")[::2] == (200, None)
    assert call(fleet, "HEAD", CHAT)[::2] == (405, None)


def test_the_content_type_does_not_matter(fleet: Fleet) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/x; b=1"):
        assert post(fleet, TEXT, body, {"Content-Type": kind})[0] == 200


def test_request_ids_are_echoed_made_or_replaced(fleet: Fleet) -> None:
    def id_for(asked: str | None) -> str:
        headers = {} if asked is None else {"X-Request-ID": asked}
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        status, has, answer = post(fleet, TEXT, body, headers)
        assert status == 200
        assert answer["id"] == f"cmpl-{has['x-request-id']}"
        return has["x-request-id"]

    assert id_for("Mine_1-a") == "Mine_1-a"
    assert id_for("Mine_1-a") == "Mine_1-a"  # free again
    assert id_for(None) != id_for(None)
    for rubbish in ("a b", "a/../b", "x" * 65, "é", "a.b>*", "'\"<script>"):
        assert id_for(rubbish) != rubbish


def test_an_id_that_is_in_use_does_not_mix_two_requests(fleet: Fleet) -> None:
    headers = {"x-request-id": "twin"}
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 20_000, "stream": True})
    first = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=5)
    try:
        first.request("POST", TEXT, body, headers)
        running = first.getresponse()
        assert running.getheader("x-request-id") == "twin"
        status, has, _ = post(
            fleet, TEXT, {"model": MODEL, "prompt": "b", "max_tokens": 2}, headers
        )
        assert status == 200
        assert has["x-request-id"].startswith("twin-")
        assert running.readline().startswith(b"data: {")
        assert fleet.cluster_info()["inflight"] == 1
    finally:
        first.close()
        running.close()


def test_api_keys(fleet: Fleet) -> None:
    port = fleet.add_router("locked", "--api-keys=k-one,k-two").port
    try:
        for given in (None, "Bearer", "Bearer wrong", "Basic k-one", "k-one", "Bearer k-on\xe9"):
            wrong = {} if given is None else {"Authorization": str(given)}
            answer = call(fleet, "GET", "/v1/models", headers=wrong, port=port)
            error = error_of(answer)
            assert (answer[0], error["code"]) == (401, "invalid_api_key")
            assert error["type"] == "authentication_error"
        for key in ("k-one", "k-two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert call(fleet, "GET", "/v1/models", headers=headers, port=port)[0] == 200
        for path in ("/health", "/live", "/ready", "/metrics", "/version"):
            assert fleet.get(path, port)[0] == 200
    finally:
        fleet.stop_extra("locked")

"""The story of a request, asked of a real router: served, refused, unknown; and its id in every
error, whichever door and whenever."""

import json
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import nats
import pytest

from tests.e2e.fleet import MODEL, Fleet
from tests.e2e.test_bad_input import call

pytestmark = pytest.mark.xdist_group("api")

TEXT = "/v1/completions"


@pytest.fixture(autouse=True)
def _idle_afterwards(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.until_idle()


def story(fleet: Fleet, wanted: str, port: int | None = None, key: str = "") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    status, _, body = call(fleet, "GET", f"/debug/requests/{wanted}", None, headers, port)
    assert status == 200, body
    found: dict[str, Any] = body
    return found


def send(
    fleet: Fleet, request_id: str, body: bytes | dict[str, Any], **rest: Any
) -> tuple[int, dict[str, str], Any]:
    data = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    return call(fleet, "POST", rest.pop("path", TEXT), data, {"x-request-id": request_id}, **rest)


def test_a_served_request_is_told_leg_by_leg_for_all_its_choices(fleet: Fleet) -> None:
    status, headers, _ = send(fleet, "story-1", {"prompt": "once " * 30, "max_tokens": 4, "n": 2})
    assert (status, headers["x-request-id"]) == (200, "story-1")
    found = story(fleet, "story-1")
    assert (found["request"], found["state"], found["status"]) == ("story-1", "ended", 200)
    assert (found["door"], found["model"]) == (f"POST {TEXT}", MODEL)
    assert [choice["choice"] for choice in found["choices"]] == ["story-1/0", "story-1/1"]
    known = {(w["worker_id"], w["incarnation"]) for w in fleet.cluster_info()["workers"]}
    for choice in found["choices"]:
        assert (choice["outcome"], choice["status"]) == ("completed", 200)
        assert choice["output_tokens"] == 4
        assert choice["legs"]
        for leg in choice["legs"]:
            assert (leg["worker"], leg["incarnation"]) in known
            assert 0 <= leg["after_s"] <= leg["ended_after_s"] <= found["took_s"] + 0.01
            assert leg["ended"] == "answered"
        assert choice["story"][0]["what"] == "submitted"
        assert choice["story"][-1]["what"] == "end completed"
    began = datetime.fromisoformat(found["began"])
    assert abs(began.timestamp() - time.time()) < 60
    assert [c["choice"] for c in story(fleet, "story-1/1")["choices"]] == ["story-1/1"]
    assert story(fleet, "cmpl-story-1")["choices"] == found["choices"]
    assert call(fleet, "GET", "/debug/requests/story-1/7")[0] == 404


REFUSED: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "no-json": (b"{", 400, "invalid_json"),
    "bad-type": ({"prompt": "x", "n": "many"}, 400, "invalid_type"),
    "no-model": ({"prompt": "x", "model": "nobody"}, 404, "model_not_found"),
    "no-tools": ({"prompt": "x", "suffix": "y"}, 400, "unsupported_parameter"),
    "too-many": ({"prompt": "x", "n": 129}, 400, "invalid_value"),
    "too-long": ({"prompt": [5] * 500_000}, 400, "context_length_exceeded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_admission_has_its_id_and_its_story(fleet: Fleet, name: str) -> None:
    body, status, code = REFUSED[name]
    got, headers, answer = send(fleet, f"refused-{name}", body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert headers["x-request-id"] == f"refused-{name}"
    assert f"refused-{name}" in answer["error"]["message"]
    found = story(fleet, f"refused-{name}")
    assert (found["state"], found["status"], found["door"]) == ("refused", status, f"POST {TEXT}")
    assert found["error"]["code"] == code
    assert found["choices"] == []
    assert fleet.metric("baton_error_answers_total", code=code, status=str(status)) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/no/such/path", 404), ("DELETE", TEXT, 405), ("GET", "/v1/models/none", 404)],
)
def test_errors_of_other_paths_have_the_id_too(
    fleet: Fleet, method: str, path: str, status: int
) -> None:
    request_id = f"path-{status}-{method}"
    got, headers, answer = call(fleet, method, path, None, {"x-request-id": request_id})
    assert (got, headers["x-request-id"]) == (status, request_id)
    assert request_id in answer["error"]["message"]
    found = story(fleet, request_id)
    assert (found["status"], found["door"]) == (status, f"{method} {path}")


def test_an_unknown_id_is_a_404_with_an_id_of_its_own(fleet: Fleet) -> None:
    for wanted in ("never-was", "x" * 3000, "a/b/c", "%00%ff"):
        status, headers, answer = call(fleet, "GET", f"/debug/requests/{wanted}")
        assert (status, answer["error"]["code"]) == (404, "unknown_request")
        assert headers["x-request-id"] in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 400


def test_who_has_no_key_learns_no_story_but_leaves_one(fleet: Fleet) -> None:
    port = fleet.add_router("locked-story", "--api-keys=k-one").port
    try:
        got, headers, answer = send(fleet, "no-key", {"prompt": "x"}, port=port)
        assert (got, headers["x-request-id"]) == (401, "no-key")
        assert "no-key" in answer["error"]["message"]
        assert call(fleet, "GET", "/debug/requests/no-key", port=port)[0] == 401
        found = story(fleet, "no-key", port, key="k-one")
        assert (found["status"], found["error"]["code"]) == (401, "invalid_api_key")
    finally:
        fleet.stop_extra("locked-story")


def test_a_refused_expectation_has_the_clients_own_id(fleet: Fleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nx-request-id: expects-1\r\n"
            b"Expect: 200-maybe\r\nContent-Length: 2\r\n\r\n"
        )
        answer = raw.recv(65536)
    assert b" 417 " in answer.split(b"\r\n")[0]
    assert b"x-request-id: expects-1" in answer.replace(b"X-Request-Id", b"x-request-id")
    assert story(fleet, "expects-1")["error"]["code"] == "expectation"


def test_an_error_in_a_stream_names_the_request(fleet: Fleet) -> None:
    """After the first byte there is no status any more: the event has the id."""
    flags = ("--served-model-name=brief", "--sim-step-ms=50", "--sim-prefill-tokens-per-s=100000")
    fleet.add_worker("brief-0", "both", *flags)
    fleet.until(lambda: b'"brief"' in fleet.get("/v1/models")[1], what="the model to be listed")
    port = fleet.add_router("short-story", "--request-timeout-ms=700").port
    try:
        fleet.until(
            lambda: b'"brief"' in fleet.get("/v1/models", port)[1] and
            fleet.get("/ready", port)[0] == 200, what="the router to see it"
        )  # fmt: skip
        body = {"model": "brief", "prompt": "x", "max_tokens": 500, "stream": True}
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            data = json.dumps(body).encode()
            raw.sendall(
                b"POST /v1/completions HTTP/1.0\r\nHost: h\r\nx-request-id: cut-1\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
            )
            answer = b""
            while piece := raw.recv(65536):
                answer += piece
        head, _, events = answer.partition(b"\r\n\r\n")
        assert b"cut-1" in head
        lines = [line for line in events.split(b"\n\n") if line]
        assert lines[-1] == b"data: [DONE]"
        error = json.loads(lines[-2].removeprefix(b"data: "))["error"]
        assert error["code"] == "request_timeout"
        assert "cut-1" in error["message"]
        found = story(fleet, "cut-1", port)
        assert found["status"] == 200, "the status had gone out with the first token"
        assert found["choices"][0]["error"]["code"] == "request_timeout"
        assert found["choices"][0]["status"] == 504
    finally:
        fleet.stop_extra("short-story")
        fleet.stop_extra("brief-0")


async def test_the_same_over_the_bus(fleet: Fleet) -> None:
    client = await nats.connect(fleet.nats_url)
    try:
        for request_id, subject, body, status, code in (
            ("told-bus-1", "completions", b"{", "400", "invalid_json"),
            ("told-bus-2", "no.such.endpoint", b"{}", "404", "not_found"),
            (
                "told-bus-3",
                "completions",
                b'{"model":"nobody","prompt":"x"}',
                "404",
                "model_not_found",
            ),
        ):
            inbox = client.new_inbox()
            replies = await client.subscribe(inbox)
            await client.publish(
                f"baton.default.api.{subject}", body, reply=inbox,
                headers={"x-request-id": request_id},
            )  # fmt: skip
            error = json.loads((await replies.next_msg(timeout=5)).data)["error"]
            assert error["code"] == code
            assert request_id in error["message"]
            last = await replies.next_msg(timeout=5)
            assert last.headers is not None
            assert (last.headers["x-request-id"], last.headers["Baton-Status"]) == (
                request_id,
                status,
            )
            found = story(fleet, request_id)
            assert (found["state"], found["status"]) == ("refused", int(status))
            assert found["door"] == f"baton.default.api.{subject}"
    finally:
        await client.close()

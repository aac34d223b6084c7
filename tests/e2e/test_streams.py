"""Streams, byte by byte on a plain socket: framing, pace, slow readers, silence, disconnects."""

import json
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.e2e.conftest import BIG_MODEL
from tests.e2e.fleet import MODEL, Fleet, Process

pytestmark = pytest.mark.xdist_group("api")

TEXT = "/v1/completions"


@pytest.fixture(autouse=True)
def _idle_afterwards(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.until_idle()


@pytest.fixture(scope="module")
def strict_router(fleet: Fleet) -> Iterator[Process]:
    """One with little patience, and pings all the time."""
    yield fleet.add_router("strict", "--client-stall-timeout-ms=1000", "--ping-interval-ms=100")
    fleet.stop_extra("strict")


@pytest.fixture(scope="module")
def big_model(fleet: Fleet) -> Iterator[str]:
    """Its name makes each chunk 4 kB."""
    flags = (f"--served-model-name={BIG_MODEL}", "--sim-step-ms=0")
    fleet.add_worker("big-0", "both", *flags)
    yield BIG_MODEL
    fleet.stop_extra("big-0")


@pytest.fixture(scope="module")
def slow_model(fleet: Fleet) -> Iterator[str]:
    """Prefills 1000 tokens a second."""
    flags = ("--served-model-name=slow", "--sim-prefill-tokens-per-s=1000")
    fleet.add_worker("slow-0", "both", *flags)
    yield "slow"
    fleet.stop_extra("slow-0")


class Connection:
    """A client that reads when it is told to."""

    def __init__(self, port: int, *, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", port))
        self._buffer = b""

    def send(self, path: str, body: dict[str, Any], *, extra: str = "") -> None:
        self.socket.sendall(request(path, body, extra=extra))

    def line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _more(self) -> None:
        piece = self.socket.recv(1 << 16)
        if not piece:
            raise EOFError
        self._buffer += piece

    def head(self) -> tuple[int, dict[bytes, bytes]]:
        status = int(self.line().split()[1])
        headers = {}
        while line := self.line():
            name, _, value = line.partition(b": ")
            headers[name.lower()] = value
        return status, headers

    def chunk(self) -> bytes:
        """One chunk of chunked framing, checked; empty at the end."""
        size = int(self.line(), 16)
        data = self.exactly(size)
        assert self.line() == b""
        return data

    def events(self) -> Iterator[bytes]:
        """Of a chunked event stream, up to its last chunk."""
        text = b""
        while data := self.chunk():
            text += data
            while b"\n\n" in text:
                event, _, text = text.partition(b"\n\n")
                yield event
        assert text == b""

    def close(self) -> None:
        self.socket.close()


@contextmanager
def connected(port: int, **options: int) -> Iterator[Connection]:
    connection = Connection(port, **options)
    try:
        yield connection
    finally:
        connection.close()


def request(path: str, body: dict[str, Any], *, extra: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{extra}\r\n"
    return head.encode() + data


def streamed(model: str = MODEL, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "x", "stream": True, "max_tokens": 5, "seed": 1, **fields}


def text_of(events: list[bytes]) -> str:
    """Of one choice's events, after checking the end."""
    assert events[-1] == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_head_and_events_of_a_chat(fleet: Fleet) -> None:
    body = streamed(messages=[{"role": "user", "content": "x"}])
    body["stream_options"] = {"include_usage": True}
    with connected(fleet.port) as connection:
        connection.send("/v1/chat/completions", body, extra="Accept-Encoding: gzip, br\r\n")
        status, headers = connection.head()
        assert status == 200
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"transfer-encoding"] == b"chunked"
        assert headers[b"x-request-id"]
        assert b"content-length" not in headers
        assert b"content-encoding" not in headers
        events = list(connection.events())
    assert events[-1] == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    *tokens, usage = chunks
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
    choices = [chunk["choices"][0] for chunk in tokens]
    assert [c["delta"].get("role") for c in choices] == ["assistant", *[None] * (len(tokens) - 1)]
    assert [c["finish_reason"] for c in choices] == [*[None] * (len(tokens) - 1), "length"]
    assert all("usage" not in chunk for chunk in tokens)


def test_a_connection_is_used_again_after_streams_and_errors(fleet: Fleet) -> None:
    with connected(fleet.port) as connection:
        texts = []
        for _ in range(3):
            connection.send(TEXT, streamed())
            assert connection.head()[0] == 200
            texts.append(text_of(list(connection.events())))
            connection.send(TEXT, streamed(max_tokens=0))
            status, headers = connection.head()
            assert status == 400
            assert b"invalid_value" in connection.exactly(int(headers[b"content-length"]))
        assert len(texts[0]) == 5
        assert len(set(texts)) == 1


def test_pipelined_requests_are_answered_in_order(fleet: Fleet) -> None:
    with connected(fleet.port) as connection:
        bodies = [streamed(max_tokens=30), streamed(max_tokens=0), streamed(max_tokens=7)]
        connection.socket.sendall(b"".join(request(TEXT, body) for body in bodies))
        assert connection.head()[0] == 200
        assert len(text_of(list(connection.events()))) == 30
        status, headers = connection.head()
        assert status == 400
        connection.exactly(int(headers[b"content-length"]))
        assert connection.head()[0] == 200
        assert len(text_of(list(connection.events()))) == 7


def test_tokens_come_one_by_one_without_the_40_ms_of_delayed_acks(fleet: Fleet) -> None:
    with connected(fleet.port) as connection:
        connection.send(TEXT, streamed(max_tokens=60))
        connection.head()
        arrivals = [time.monotonic() for _ in connection.events()]
    gaps = sorted(after - before for before, after in pairwise(arrivals))
    assert len(gaps) >= 50
    assert gaps[len(gaps) // 2] < 0.02  # a step of the model takes 5 ms


def test_a_slow_reader_gets_everything_in_order(fleet: Fleet, big_model: str) -> None:
    num_tokens = 2500
    body = streamed(big_model, max_tokens=num_tokens)
    with connected(fleet.port, receive_bytes=8192) as connection:
        connection.send(TEXT, body)
        fleet.until(
            lambda: fleet.metric("baton_choices_total", model=big_model, outcome="completed") > 0,
            what="the model to be done",
        )
        time.sleep(0.6)  # the reader is slow: that is the test; sweeps see it twice
        assert connection.head()[0] == 200
        text = text_of(list(connection.events()))
        assert connection.socket.fileno() >= 0
        connection.send(TEXT, {**body, "max_tokens": 3, "stream": False})
        assert connection.head()[0] == 200
    with connected(fleet.port) as connection:
        connection.send(TEXT, body)
        connection.head()
        assert text_of(list(connection.events())) == text
    assert len(text) == num_tokens


def test_a_reader_that_takes_a_little_is_not_cut(
    fleet: Fleet, strict_router: Process, big_model: str
) -> None:
    """It needs far longer than the stall timeout for the whole."""
    slow = fleet.metric("baton_slow_clients_total", strict_router.port)
    with connected(strict_router.port, receive_bytes=8192) as connection:
        connection.send(TEXT, streamed(big_model, max_tokens=1600))
        began = time.monotonic()
        assert connection.head()[0] == 200
        received = 0
        while time.monotonic() - began < 2.5:
            received += len(connection.socket.recv(1 << 16))
            time.sleep(0.05)  # paced, as the test is about
        while piece := connection.socket.recv(1 << 16):
            received += len(piece)
            if piece.endswith(b"0\r\n\r\n"):
                break
    assert received > 1600 * len(big_model)
    assert fleet.metric("baton_slow_clients_total", strict_router.port) == slow


def test_a_client_that_never_reads_is_aborted(
    fleet: Fleet, strict_router: Process, big_model: str
) -> None:
    port = strict_router.port
    slow = fleet.metric("baton_slow_clients_total", port)
    with connected(port, receive_bytes=8192) as connection:
        connection.send(TEXT, streamed(big_model, max_tokens=60_000, n=4))
        fleet.until(lambda: fleet.cluster_info(port)["inflight"] == 4, what="the start")
        fleet.until(
            lambda: fleet.metric("baton_slow_clients_total", port) == slow + 1,
            what="the abort",
            timeout_s=8,
        )
        fleet.until(lambda: fleet.cluster_info(port)["inflight"] == 0, what="cancel", timeout_s=1)
        fleet.until(lambda: fleet.is_idle(port), what="idle workers")
        connection.head()
        with pytest.raises((EOFError, ConnectionError)):
            deque(connection.events(), maxlen=0)


def test_a_finished_answer_that_nobody_takes_is_aborted(
    fleet: Fleet, strict_router: Process, big_model: str
) -> None:
    """The choice has completed; the end of the stream still waits for the reader."""
    port = strict_router.port
    slow = fleet.metric("baton_slow_clients_total", port)
    with connected(port, receive_bytes=8192) as connection:
        connection.send(TEXT, streamed(big_model, max_tokens=2000))
        fleet.until(
            lambda: fleet.metric("baton_slow_clients_total", port) == slow + 1,
            what="the abort",
            timeout_s=8,
        )
        assert fleet.cluster_info(port)["inflight"] == 0


def test_comments_keep_a_long_prefill_alive(
    fleet: Fleet, strict_router: Process, slow_model: str
) -> None:
    with connected(strict_router.port) as connection:
        connection.send(TEXT, streamed(slow_model, prompt="p" * 700))
        assert connection.head()[0] == 200
        events = list(connection.events())
    pings = [event for event in events if event == b": ping"]
    assert len(pings) >= 3
    assert len(text_of([event for event in events if event != b": ping"])) == 5


def test_an_error_after_the_first_ping_is_an_event(
    fleet: Fleet, strict_router: Process, slow_model: str
) -> None:
    """The status is gone by then: the error comes as an event, and `[DONE]` after it."""
    router = fleet.add_router(
        "hasty", "--ping-interval-ms=100", "--request-timeout-ms=400", "--api-keys=k"
    )
    try:
        with connected(router.port) as connection:
            body = streamed(slow_model, prompt="q" * 1500)
            connection.send(TEXT, body, extra="Authorization: Bearer k\r\n")
            assert connection.head()[0] == 200
            events = [event for event in connection.events() if event != b": ping"]
        assert len(events) == 2
        error = json.loads(events[0].removeprefix(b"data: "))["error"]
        assert error["code"] == "request_timeout"
        assert error["type"] == "timeout_error"
        assert events[1] == b"data: [DONE]"
    finally:
        fleet.stop_extra("hasty")


def test_a_client_that_leaves_before_the_first_token_is_cancelled(
    fleet: Fleet, slow_model: str
) -> None:
    with connected(fleet.port) as connection:
        connection.send(TEXT, streamed(slow_model, prompt="r" * 3000))
        fleet.until(lambda: fleet.cluster_info()["inflight"] == 1, what="the start")
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=0.5)


def test_a_client_that_resets_mid_stream_is_cancelled(fleet: Fleet) -> None:
    with connected(fleet.port) as connection:
        connection.send(TEXT, streamed(max_tokens=20_000, n=2))
        connection.head()
        connection.chunk()
        linger = struct.pack("ii", 1, 0)  # close with a reset
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=0.5)


def test_many_clients_that_come_and_go_leave_nothing(fleet: Fleet) -> None:
    """Each leaves at another moment of its request."""
    for number in range(40):
        with connected(fleet.port) as connection:
            connection.send(TEXT, streamed(max_tokens=2000, n=1 + number % 3))
            if number % 4:
                connection.head()
            for _ in range(number % 4 * 2):
                connection.chunk()
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=1.0)
    fleet.until_idle()


def test_a_router_that_leaves_finishes_its_streams_and_tells_the_rest(fleet: Fleet) -> None:
    router = fleet.add_router("leaving", "--drain-timeout-ms=700")
    with connected(router.port) as short, connected(router.port) as long:
        short.send(TEXT, streamed(max_tokens=60))
        long.send(TEXT, streamed(max_tokens=20_000))
        assert short.head()[0] == long.head()[0] == 200
        assert fleet.stop_extra("leaving") == 0
        assert len(text_of(list(short.events()))) == 60
        *_, error, done = long.events()
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert done == b"data: [DONE]"

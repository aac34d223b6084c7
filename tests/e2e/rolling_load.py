"""Clients that never stop asking and retry nothing: every error that a restart causes shows.

Over HTTP each keeps its connection as long as the server lets it, as pools of clients do; over NATS
all share one. Half of the answers are streamed. What each must say is known (`Ask.expected`).
"""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import nats
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from tests.e2e.fleet import Fleet
from tests.e2e.streams import Ask, asks

TIMEOUT_S: Final = 20.0
MAX_TOKENS: Final = 40
SUBJECT: Final = "baton.default.api.completions"


class Load:
    """What all clients found."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.errors: list[str] = []
        self.answered = {"http": 0, "nats": 0}
        self.reused = 0
        """Requests over HTTP on a connection that had one before."""
        self.worst_gap = 0.0
        """Seconds without a chunk in a stream, or until it began."""
        self._lock = threading.Lock()

    def right(self, kind: str) -> None:
        with self._lock:
            self.answered[kind] += 1

    def wrong(self, text: str) -> None:
        with self._lock:
            self.errors.append(text)

    def silent(self, seconds: float) -> None:
        with self._lock:
            self.worst_gap = max(self.worst_gap, seconds)

    def check(self) -> None:
        assert not self.errors, f"{len(self.errors)} errors: {self.errors[:5]}"
        assert min(self.answered.values()) > 20, self.answered


class Gaps:
    """The longest pause between two signs of life of one stream."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._last_at = time.monotonic()

    def heard(self) -> None:
        now = time.monotonic()
        self._load.silent(now - self._last_at)
        self._last_at = now


class KeepAlive(threading.Thread):
    """One HTTP client with one connection at a time."""

    def __init__(self, load: Load, port: int, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._load = load
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self.start()

    def run(self) -> None:
        try:
            for number, ask in enumerate(_asks(self.name)):
                if self._load.stop.wait(0.01 * (number % 5)):
                    break
                self._load.reused += self._connection.sock is not None
                self._one(ask, stream=number % 2 == 0)
        finally:
            self._connection.close()

    def _one(self, ask: Ask, *, stream: bool) -> None:
        try:
            headers = {"content-type": "application/json"}
            gaps = Gaps(self._load)
            self._connection.request("POST", "/v1/completions", ask.body(stream=stream), headers)
            answer = self._connection.getresponse()
            if answer.status != 200:
                self._load.wrong(f"{self.name}: {answer.status} {answer.read()!r}")
                return
            lines = [line for line in _heard(answer, gaps) if line.strip()]
            problem = problem_of(ask, lines) if stream else whole_problem_of(ask, lines)
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = repr(error)
            self._connection.close()
        if problem:
            self._load.wrong(f"{self.name}: {problem}")
        else:
            self._load.right("http")


def _heard(answer: http.client.HTTPResponse, gaps: Gaps) -> Iterator[bytes]:
    for line in answer:
        gaps.heard()
        yield line
    answer.read()  # its last line does not end it


def _asks(name: str) -> Iterator[Ask]:
    number = 0
    while True:
        yield from asks(50, MAX_TOKENS, kind=f"{name} {number}")
        number += 1


def problem_of(ask: Ask, lines: Sequence[bytes]) -> str:
    """Of the lines of a stream; empty if they are right to the last one."""
    *chunks, done = [line.removeprefix(b"data: ").strip() for line in lines]
    if done != b"[DONE]":
        return f"ended without [DONE] after {len(chunks)} chunks"
    return text_problem(ask, [json.loads(chunk) for chunk in chunks])


def whole_problem_of(ask: Ask, lines: Sequence[bytes]) -> str:
    return text_problem(ask, [json.loads(b"".join(lines))])


def text_problem(ask: Ask, bodies: Sequence[dict[str, Any]]) -> str:
    wrong = [body["error"] for body in bodies if "error" in body]
    if wrong:
        return str(wrong[0])
    text = "".join(choice["text"] for body in bodies for choice in body["choices"])
    if text != ask.expected():
        return f"inexact: {text!r} instead of {ask.expected()!r}"
    return ""


class NatsClients(threading.Thread):
    """Some clients on one NATS connection, in a loop of their own."""

    def __init__(self, load: Load, url: str, count: int) -> None:
        super().__init__(daemon=True, name="nats")
        self._load = load
        self._url = url
        self._count = count
        self.start()

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        client = await nats.connect(self._url)
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self._count):
                    tasks.create_task(self._client(client, f"nats {number}"))
        finally:
            await client.close()

    async def _client(self, client: NatsClient, name: str) -> None:
        for number, ask in enumerate(_asks(name)):
            if self._load.stop.is_set():
                return
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    problem = await self._one(client, ask, stream=number % 2 == 0)
            except TimeoutError:
                problem = "no answer"
            if problem:
                self._load.wrong(f"{name}: {problem}")
            else:
                self._load.right("nats")
            await asyncio.sleep(0.01)

    async def _one(self, client: NatsClient, ask: Ask, *, stream: bool) -> str:
        messages: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=messages.put)
        await client.publish(SUBJECT, ask.body(stream=stream), reply=inbox)
        gaps = Gaps(self._load)
        bodies = []
        while True:
            message = await messages.get()
            gaps.heard()
            if message.data:
                bodies.append(json.loads(message.data))
                continue
            await subscription.unsubscribe()
            headers = message.headers or {}
            if headers.get("Baton-Status") != "200":
                return f"ended with {headers} {bodies[-1:]}"
            return text_problem(ask, bodies)


@contextmanager
def under_load(
    fleet: Fleet, *, port: int = 0, http_clients: int = 5, nats_clients: int = 3
) -> Iterator[Load]:
    """Clients ask inside of the block, and end what they have begun after it."""
    load = Load()
    clients: list[threading.Thread] = [
        KeepAlive(load, port or fleet.port, f"http {number}") for number in range(http_clients)
    ]
    clients.append(NatsClients(load, fleet.nats_url, nats_clients))
    try:
        fleet.until(lambda: min(load.answered.values()) > 3, what="the load to flow")
        yield load
    finally:
        load.stop.set()
        for client in clients:
            client.join(TIMEOUT_S + 5.0)
    assert not [client.name for client in clients if client.is_alive()], "a client hangs"

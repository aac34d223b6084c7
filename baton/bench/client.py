"""A client that costs little: one keep-alive connection, plain writes, and a look at each arrival.

It does what most clients do (no tricks with acknowledgements), checks the status and the end of
each answer, and parses nothing else.
"""

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

from protocol.errors import ConfigError

ANSWER_TIMEOUT_S: Final = 120.0
_TAIL: Final = 64


@dataclass(slots=True)
class Answer:
    """Times are `time.perf_counter` seconds."""

    asked_at: float
    arrivals: list[float] = field(default_factory=list)
    """Of each piece that the socket gave, the first with the head."""
    body: bytes = b""
    """Of an answer in a piece."""

    @property
    def first_s(self) -> float:
        return self.arrivals[0] - self.asked_at

    @property
    def whole_s(self) -> float:
        return self.arrivals[-1] - self.asked_at

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def chat(text: str, max_tokens: int, *, stream: bool) -> bytes:
    """A whole HTTP request."""
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    if stream:
        body["stream"] = True
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Client(asyncio.Protocol):
    """One connection; one question at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._tail = b""
        self._head = b""
        self._wanted = 0
        self._have = 0

    @classmethod
    async def connect(cls, port: int) -> Self:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(cls, "127.0.0.1", port)
        return client

    async def ask(self, request: bytes) -> Answer:
        """Raises ConfigError if the answer is not a whole 200."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._tail = self._head = b""
        self._wanted = self._have = 0
        self._answer = Answer(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._done
        except TimeoutError:
            raise ConfigError("an answer did not come") from None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        answer.arrivals.append(time.perf_counter())
        if len(answer.arrivals) == 1:
            self._begin(data)
        self._have += len(data)
        if self._wanted:
            answer.body += data
            if self._have >= self._wanted:
                self._end(answer)
            return
        self._tail = data if len(data) >= _TAIL else (self._tail + data)[-_TAIL:]
        if self._tail.endswith(b"0\r\n\r\n"):
            if b"[DONE]" not in self._tail[-_TAIL:]:
                self._fail(f"a stream was cut short: {self._tail!r}")
            self._end(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}")

    def _begin(self, data: bytes) -> None:
        head, _, _ = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(f"not a 200: {data[:300]!r}")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                self._wanted = len(head) + 4 + int(line.partition(b":")[2])

    def _end(self, answer: Answer) -> None:
        self._answer = None
        if self._done is not None and not self._done.done():
            answer.body = answer.body.partition(b"\r\n\r\n")[2]
            self._done.set_result(answer)

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConfigError(why))


async def closed_loop(port: int, requests: Iterable[bytes], num_clients: int) -> list[Answer]:
    """So many clients, each asking again as soon as it has its answer."""
    left = iter(requests)
    answers: list[Answer] = []

    async def one() -> None:
        client = await Client.connect(port)
        try:
            for request in left:  # shared by all clients
                answers.append(await client.ask(request))  # noqa: PERF401
        finally:
            client.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_clients):
            tasks.create_task(one())
    return answers

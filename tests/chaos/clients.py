"""Clients for rows that break things: streams that know their story's name and when tokens came,
and clients that leave or stop reading.

They know a router's port and the OpenAI API, nothing of faults.
"""

import json
import socket
import time
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any

from tests.e2e.fleet import MODEL, Fleet
from tests.e2e.streams import Ask, Stream, asks

_numbers = count(1)


class Client(Stream):
    """One stream under an id of its own."""

    def __init__(self, fleet: Fleet, ask: Ask, *, port: int = 0) -> None:
        self.request_id = f"chaos-{next(_numbers)}"
        self.arrivals: list[float] = []
        self.may_fail: frozenset[str] = frozenset()
        """Codes of errors that are right here; `broken` for a connection that breaks."""
        super().__init__(fleet, ask, port=port)

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "x-request-id": self.request_id}

    def run(self) -> None:
        """`http.client` takes a body that was cut short for a whole one."""
        super().run()
        if self.status == 200 and not (self.is_done or self.error or self.broken):
            self.broken = "ended without [DONE]"

    def _take(self, chunk: dict[str, Any]) -> None:
        self.arrivals.append(time.monotonic())
        super()._take(chunk)

    def gap_after(self, fault_at: float) -> float:
        """The longest silence that ended after `fault_at`, counted from then at the earliest."""
        ends = [self.started_at, *self.arrivals]
        if not self.is_alive() and (self.error or self.broken):
            ends.append(self.last_at)
        gaps = [later - max(fault_at, before) for before, later in pairwise(ends)]
        return max(gaps, default=0.0)

    def wrong(self) -> str:
        """Why this is not what was promised to this client; empty if it is."""
        problem = self.problem()
        if not problem:
            return ""
        if self.broken and "broken" in self.may_fail:
            return "" if self.is_prefix else f"inexact before it broke: {self.text!r}"
        if self.error.get("code") in self.may_fail:
            return "" if self.is_prefix else f"inexact before its error: {self.text!r}"
        return f"{self.request_id}: {problem}"

    @property
    def is_prefix(self) -> bool:
        return self.ask.expected().startswith(self.text)

    @property
    def has_failed(self) -> bool:
        return bool(self.broken or self.error) or self.status != 200


def start(fleet: Fleet, wanted: Sequence[Ask], *, port: int = 0) -> list[Client]:
    """All at once."""
    return [Client(fleet, ask, port=port) for ask in wanted]


def wave(number: int, *, salt: object) -> list[Ask]:
    """New requests, half of them short enough to be prefilled where they decode."""
    half = number // 2
    return [
        *asks(half, 20, kind=f"{salt} short", prompt=48),
        *asks(number - half, 20, kind=f"{salt} long", prompt=160),
    ]


class Socket:
    """A client by hand: it leaves, or reads nothing."""

    def __init__(self, port: int, *, receive_bytes: int = 0) -> None:
        self.request_id = f"chaos-{next(_numbers)}"
        self._socket = socket.socket()
        if receive_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(10.0)
        self._socket.connect(("127.0.0.1", port))

    def ask(self, ask: Ask, **more: Any) -> None:
        body = json.dumps({**json.loads(ask.body()), **more}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\n"
            f"x-request-id: {self.request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)

    def leave(self) -> None:
        self._socket.close()

    def is_cut(self) -> bool:
        """The other side has ended the connection; what it sent before is not read for that."""
        try:
            return self._socket.send(b"\r\n") == 0
        except OSError:
            return True


class DeafNatsClient:
    """Asks over NATS by hand and never reads the answer."""

    def __init__(self, nats_port: int, wanted: Sequence[Ask], **more: Any) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(10.0)
        self._socket.connect(("127.0.0.1", nats_port))
        connect = b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\nSUB in.> 1\r\n'
        self._socket.sendall(connect)
        for number, ask in enumerate(wanted):
            body = json.dumps({**json.loads(ask.body()), **more}).encode()
            head = f"PUB baton.default.api.completions in.{number} {len(body)}\r\n"
            self._socket.sendall(head.encode() + body + b"\r\n")

    def leave(self) -> None:
        self._socket.close()


def until(condition: Callable[[], object], *, timeout_s: float, step_s: float = 0.02) -> bool:
    """Whether it came true in time; other processes cannot wake us."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(step_s)
    return True


__all__ = ["MODEL", "Client", "DeafNatsClient", "Socket", "start", "until", "wave"]

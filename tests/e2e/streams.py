"""Many streams at once, read by threads while a test breaks things, and what each must have said.

The simulated engine's text is a function of prompt and sampling alone, so `Stream.check` compares
with what no network, worker or transfer had a hand in.
"""

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.sampling import Sampling
from tests.e2e.fleet import MODEL, Fleet
from worker.engine.simulated import SimulatedConfig, expected_tokens

END_S = 45.0
"""More than any deadline that the tests leave a fleet."""
NUM_FLOWING = 12
_CONFIG = SimulatedConfig(name=MODEL)


@dataclass(frozen=True)
class Ask:
    """One completion."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None
    """None: greedy."""

    def sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0} if self.seed is None else {"seed": self.seed}

    def body(self, *, stream: bool = True) -> bytes:
        body = {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "stream": stream,
            **self.sampling(),
        }
        return json.dumps(body).encode()

    def expected(self) -> str:
        temperature = 0.0 if self.seed is None else 1.0
        sampling = Sampling(self.max_tokens, temperature=temperature, seed=self.seed or 0)
        return bytes(expected_tokens(self.prompt, sampling, self.max_tokens, _CONFIG)).decode()


def asks(count: int, max_tokens: int, *, kind: str, prompt: int = 0) -> list[Ask]:
    """Prompts of 20 to 400 bytes (or of `prompt`), each of its own; every other one greedy, and of
    `max_tokens` or up to a quarter more. The same `kind` gives the same ones."""
    rng = random.Random(f"{kind}/{count}/{max_tokens}/{prompt}")
    return [
        Ask(
            prompt=tuple(rng.randrange(97, 123) for _ in range(prompt or rng.randint(20, 400))),
            max_tokens=max_tokens + rng.randint(0, max_tokens // 4),
            seed=rng.randrange(1 << 30) if i % 2 else None,
        )
        for i in range(count)
    ]


class Stream(threading.Thread):
    """One client with one SSE stream."""

    def __init__(self, fleet: Fleet, ask: Ask, *, port: int = 0) -> None:
        super().__init__(daemon=True)
        self.ask = ask
        self.status = 0
        self.told_id = ""
        """The id that the router gave the request."""
        self.text = ""
        self.finish = ""
        self.error: dict[str, Any] = {}
        self.broken = ""
        self.is_done = False
        self.started_at = time.monotonic()
        self.last_at = self.started_at
        self.worst_gap = 0.0
        self.flowing = threading.Event()
        """Some tokens are here, or it is over."""
        self._port = port or fleet.port
        self.start()

    def headers(self) -> dict[str, str]:
        return {"content-type": "application/json"}

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=END_S)
        try:
            connection.request("POST", "/v1/completions", self.ask.body(), self.headers())
            response = connection.getresponse()
            self.status = response.status
            self.told_id = response.headers["x-request-id"]
            if response.status == 200:
                self._read(response)
            else:
                self.error = json.loads(response.read())["error"]
        except (OSError, http.client.HTTPException) as error:
            self.broken = repr(error)
        finally:
            self.last_at = time.monotonic()
            connection.close()
            self.flowing.set()

    def _read(self, response: http.client.HTTPResponse) -> None:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            assert not self.is_done, f"after [DONE]: {line!r}"
            if line == b"data: [DONE]\n":
                self.is_done = True
                continue
            self._take(json.loads(line[6:]))

    def _take(self, chunk: dict[str, Any]) -> None:
        now = time.monotonic()
        self.worst_gap = max(self.worst_gap, now - self.last_at)
        self.last_at = now
        if "error" in chunk:
            self.error = chunk["error"]
            return
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
        if len(self.text) >= NUM_FLOWING:
            self.flowing.set()

    @property
    def took_s(self) -> float:
        return self.last_at - self.started_at

    def ended(self) -> "Stream":
        """When it is over; a stream that is not in time hangs."""
        self.join(END_S)
        assert not self.is_alive(), f"hangs after {len(self.text)} characters: {self.ask}"
        return self

    def problem(self) -> str:
        """Empty if the whole text came, exact, and ended as it should."""
        if self.broken or self.error or self.status != 200:
            return f"status {self.status}, {self.broken or self.error}, {len(self.text)} characters"
        expected = self.ask.expected()
        if self.text != expected:
            same = [a == b for a, b in zip(self.text, expected, strict=False)]
            at = same.index(False) if False in same else len(same)
            return f"wrong at {at} of {len(expected)}, has {len(self.text)}"
        if self.finish != "length" or not self.is_done:
            return f"finish {self.finish!r}, [DONE] {self.is_done}"
        return ""


def start_streams(fleet: Fleet, wanted: Sequence[Ask], *, port: int = 0) -> list[Stream]:
    """All at once; `port` of another router than the first."""
    return [Stream(fleet, ask, port=port) for ask in wanted]


def until_flowing(streams: Sequence[Stream]) -> None:
    """Until every stream has some tokens, and none has all."""
    for stream in streams:
        assert stream.flowing.wait(10.0), "no tokens"
    over = [stream.problem() for stream in streams if not stream.is_alive()]
    assert not over, f"too short to be broken: {over}"


def until_ended(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.ended()


def check_exact(streams: Sequence[Stream]) -> None:
    """Every stream ends, whole and exact."""
    until_ended(streams)
    problems = [problem for stream in streams if (problem := stream.problem())]
    assert not problems, problems


def completion(fleet: Fleet, ask: Ask) -> tuple[int, dict[str, Any]]:
    """Not streamed: status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=END_S)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", ask.body(stream=False), headers)
        response = connection.getresponse()
        body: dict[str, Any] = json.loads(response.read())
        return response.status, body

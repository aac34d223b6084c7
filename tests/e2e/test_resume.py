"""Real workers with a real model are killed under their streams: each goes on as if nothing was.

One decode worker has all the streams, and dies with `kill -9`; others go on with them. What a
client gets is what it got in peace. No decision of these answers hangs on less than `CLEAR` (the
seeds were chosen so; `tests/integration/resume_judge.py` says what that means), thirty times what
other batches move: nothing is excused. `tests/async/test_resume_exact.py` cuts at every token.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import pytest

from tests.e2e.fleet import MODEL, Fleet
from tests.integration.resume_said import Said, differences, worst_distance

pytestmark = [pytest.mark.xdist_group("resume"), pytest.mark.timeout(120)]

CLEAR = 8e-4
NOISE = 1e-3
"""Log-probabilities may differ by less."""
NUM_TOKENS = 100
NUM_LONGEST = 700
LONGEST = "greedy, penalties"
"""The case that is cut twice."""
NUM_BEFORE = 3
"""Chunks of the slowest stream when its worker is killed; others have many more."""
END_S = 45.0
PROMPT = "The router reads a request and "
EOS = "2"
ODD = ("é你😀 ż" + "漢字" * 4 + "!") * 3
BYTES = (133, 108, 166, 127, 260, 178, 259, 252, 228)
"""Tokens of the demo model that are bytes of `é你😀`."""
STRINGS = {"type": "string", "minLength": 8, "maxLength": 16}
SETTINGS = (
    "worker.threads=1",
    "worker.lease_ms=3000",
    "router.silence_timeout_ms=1500",
    "router.stall_timeout_ms=4000",
)


def body(**options: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}


def chat(**options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something about leases."}]
    return {"messages": messages, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}


def schema(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": kind}}


CASES: dict[str, dict[str, Any]] = {
    "greedy": body(),
    "nucleus": body(temperature=0.8, top_p=0.95, seed=4, logprobs=2),
    "top_k, min_p": body(temperature=0.9, top_k=20, min_p=0.05, seed=7),
    "penalties": body(
        temperature=0.7,
        seed=32,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.7,
    ),
    "bias": body(temperature=0.7, seed=2, logit_bias={"204": 3, "295": -100}),
    "odd": body(response_format=schema({"const": ODD}), logprobs=0, max_tokens=150),
    "broken": body(temperature=0.7, seed=6, logit_bias=dict.fromkeys(map(str, BYTES), 60)),
    "choices": body(temperature=0.5, seed=2, n=3, max_tokens=60),
    "chat": chat(temperature=0.7, seed=4, logprobs=True, top_logprobs=3),
    "echo": body(temperature=0.5, seed=3, n=2, echo=True, logprobs=1, max_tokens=70),
    "schema": body(
        temperature=0.9,
        seed=8,
        logprobs=0,
        response_format=schema({"type": "array", "items": STRINGS, "minItems": 9, "maxItems": 9}),
    ),
    "ends": body(temperature=0.7, seed=8, logit_bias={EOS: 8}, skip_special_tokens=False),
    LONGEST: body(
        max_tokens=NUM_LONGEST,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logprobs=1,
    ),
    "min_tokens": body(ignore_eos=False, min_tokens=80, logit_bias={EOS: 60}),
}


@dataclass
class Heard:
    """One stream, or what there is of it."""

    said: list[Said]
    usage: dict[str, Any] = field(default_factory=dict)
    num_chunks: int = 0
    error: Any = None
    is_done: bool = False


class Clients:
    """Streams of one loop, all at once."""

    def __init__(self, base_url: str, cases: dict[str, dict[str, Any]]) -> None:
        self._base_url = base_url
        self._cases = cases
        self.heard = {
            name: Heard([Said() for _ in range(asked.get("n", 1))]) for name, asked in cases.items()
        }
        self._moved = asyncio.Event()

    async def run(self, then: Callable[[], None] | None = None) -> dict[str, Heard]:
        """Until all have ended. `then` is called in a thread when all flow; none may be over."""
        async with (
            asyncio.timeout(END_S),
            aiohttp.ClientSession() as session,
            asyncio.TaskGroup() as tasks,
        ):
            for name, asked in self._cases.items():
                tasks.create_task(self._read(session, asked, self.heard[name]))
            if then is not None:
                while min(one.num_chunks for one in self.heard.values()) < NUM_BEFORE:
                    self._moved.clear()
                    await self._moved.wait()
                await asyncio.to_thread(then)
        return self.heard

    async def _read(
        self, session: aiohttp.ClientSession, asked: dict[str, Any], heard: Heard
    ) -> None:
        path = "chat/completions" if "messages" in asked else "completions"
        whole = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **asked}
        async with session.post(f"{self._base_url}/v1/{path}", json=whole) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line == b"data: [DONE]\n":
                    heard.is_done = True
                elif line.startswith(b"data: "):
                    _hear(heard, json.loads(line[6:]))
                    self._moved.set()


def _hear(heard: Heard, chunk: dict[str, Any]) -> None:
    heard.error = chunk.get("error") or heard.error
    heard.usage = chunk.get("usage") or heard.usage
    heard.num_chunks += 1
    for choice in chunk.get("choices", ()):
        heard.said[choice["index"]].hear(choice)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("resuming")
    with Fleet(folder, decode=3, engine="torch", settings=SETTINGS) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def calm(fleet: Fleet) -> dict[str, tuple[dict[str, Any], Heard]]:
    """Every case and its undisturbed answer; stop strings are taken from one of them."""
    cases = dict(CASES)
    found = asyncio.run(Clients(fleet.base_url, cases).run())
    text = found["greedy"].said[0].text
    stops = [text[3:90] + "§", text[60:-60] + "§", text[-40:-9], text[-20:] + "§"]
    cases["stop"] = body(stop=stops)
    cases["stop, shown"] = body(stop=stops, include_stop_str_in_output=True, logprobs=0)
    found |= asyncio.run(
        Clients(fleet.base_url, {name: cases[name] for name in ("stop", "stop, shown")}).run()
    )
    assert found["stop"].said[0].text == text[: text.index(stops[2])]
    assert json.loads(found["odd"].said[0].text) == ODD
    for name, heard in found.items():
        assert heard.is_done, name
        assert heard.error is None, name
    return {name: (asked, found[name]) for name, asked in cases.items()}


def check_same(calm: dict[str, tuple[dict[str, Any], Heard]], found: dict[str, Heard]) -> None:
    problems: list[str] = []
    worst = 0.0
    for name, heard in found.items():
        whole = calm[name][1]
        if heard.error is not None or not heard.is_done:
            problems.append(f"{name}: {heard.error}")
            continue
        for index, (one, other) in enumerate(zip(whole.said, heard.said, strict=True)):
            differs = differences(one, other, tolerance=NOISE)
            problems += [f"{name}, choice {index}: {difference}" for difference in differs]
            worst = max(worst, 0.0 if differs else worst_distance(one, other))
        if heard.usage != whole.usage:
            problems.append(f"{name}: usage {heard.usage}, not {whole.usage}")
    assert not problems, "\n".join(problems)
    print(f"{len(found)} interrupted requests, log-probabilities within {worst:.1e}")


def test_streams_of_killed_workers_go_on_exactly(
    fleet: Fleet, calm: dict[str, tuple[dict[str, Any], Heard]]
) -> None:
    """All streams lose their decode worker. The longest then loses the next one too, and the only
    prefill worker with it: the last decode worker computes all that it needs by itself."""
    cases = {name: asked for name, (asked, _) in calm.items()}
    others = ("decode-1", "decode-2")
    pids = [fleet.process(name).pid for name in others]
    resumed = fleet.metric("baton_events_total", kind="resume")

    async def interrupted() -> dict[str, Heard]:
        clients = Clients(fleet.base_url, cases)

        def kill() -> None:
            fleet.kill("decode-0")
            over = [name for name, heard in clients.heard.items() if heard.is_done]
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            assert not over, f"over before the kill: {over}"
            fleet.until(partial(is_last, clients, LONGEST), what="the others' end", timeout_s=END_S)
            victim = fleet.until(lambda: streaming(fleet), what="a decode worker")
            fleet.kill(victim)
            fleet.kill("prefill-0")
            assert not clients.heard[LONGEST].is_done, "too fast for a second kill"

        return await clients.run(kill)

    with fleet.frozen(others[0]), fleet.frozen(others[1]):
        fleet.until(lambda: not {*others} & {*fleet.eligible()}, what="silence of the others")
        found = asyncio.run(interrupted())
    check_same(calm, found)
    num_choices = sum(len(heard.said) for heard in found.values())
    assert fleet.metric("baton_events_total", kind="resume") - resumed >= num_choices + 1
    fleet.until_idle(timeout_s=8)


def is_last(clients: Clients, name: str) -> bool:
    """All the others have ended."""
    return all(heard.is_done for other, heard in clients.heard.items() if other != name)


def streaming(fleet: Fleet) -> str:
    """The living decode worker that has the one choice there is."""
    workers = fleet.cluster_info()["workers"]
    names = [w["worker_id"] for w in workers if w["role"] == "decode" and w["reservations"]]
    return next((str(name) for name in names if name in fleet.alive()), "")

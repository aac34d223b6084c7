"""`python -m tests.chaos.overload --seconds 60`: ten times what a fleet can do, and what is left of
it.

First as many clients as the fleet has places, one request after the other: the peak. Then requests
come ten times as fast as it served those, whether it answers or not. What can be served in time is
let into the queue, the rest is told to come back; what was let in is served in time, whole, and as
much of it a second as at the peak. Five seconds after the last request everything is as before.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.chaos.soak import sample
from tests.chaos.world import TRANSPORTS, ChaosFleet
from tests.e2e.streams import Ask

TIMES: Final = 10
PLACES: Final = 32
"""Sequences that the decode workers of this fleet run at once, together."""
TOKENS: Final = 40
PROMPTS: Final = 64
QUEUE_S: Final = 3.0
"""Who waits as long and is then served is through within `AFTER_S`."""
SETTINGS: Final = (
    f"worker.max_running={PLACES // 2}",
    "worker.sim_step_ms=40",
    "worker.max_step_tokens=4096",
    "worker.sim_transfer_bytes_per_s=0",
    f"router.queue_timeout_ms={QUEUE_S * 1e3:.0f}",
    f"router.decode_wait_timeout_ms={QUEUE_S * 1e3:.0f}",
    "router.stall_timeout_ms=10000",
    "router.prefill_timeout_ms=10000",
)
CODES: Final = {"queue_full", "queue_timeout"}
FULL_S: Final = 60.0
"""From so long a run on it is known what grows."""
LATE_S: Final = 1.0
"""More than its deadline may an answer take on a machine that is busy."""
AFTER_S: Final = 5.0
"""So long after the last request came, nothing is left of it."""
PATIENCE_S: Final = 10.0
LEAST: Final = 0.9
MORE_MB: Final = 4.0
"""So much may RSS still grow in the second half: by then everything that has a bound is full."""


@dataclass
class Answer:
    """What one client was told."""

    status: int = 0
    first_s: float = 0.0
    """Seconds to the first token, or to the refusal."""
    took_s: float = 0.0
    ended_at: float = 0.0
    code: str = ""
    retry_after: str = ""
    wrong: str = ""


@dataclass
class Load:
    """Open or closed, against one router. A few prompts, whose answers are known before."""

    port: int
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(7)
        prompts = [tuple(rng.randrange(97, 123) for _ in range(120)) for _ in range(PROMPTS)]
        self._asks = [self._known(Ask(prompt, TOKENS)) for prompt in prompts]
        self._brief = self._known(Ask(prompts[0], 2))
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._count = 0

    @staticmethod
    def _known(ask: Ask) -> tuple[bytes, str]:
        """The request, and the text that is right."""
        body = ask.body()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body, ask.expected()

    async def closed(self, clients: int, seconds: float) -> None:
        """Each asks again when it has its answer."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(client())

    async def opened(self, per_s: float, seconds: float, tasks: asyncio.TaskGroup) -> float:
        """They come at that pace. When the last one was asked, on the monotonic clock."""
        began = now = time.monotonic()
        asked = 0
        while now - began < seconds:
            while asked < (now - began) * per_s:
                tasks.create_task(self.ask())
                asked += 1
            await asyncio.sleep(0.005)
            now = time.monotonic()
        return now

    async def ask(self, *, brief: bool = False) -> Answer:
        """One request, of two tokens if `brief`. Whatever goes wrong is in the answer."""
        answer = Answer()
        request, expected = self._brief if brief else self._asks[self._count % PROMPTS]
        self._count += 1
        began = time.monotonic()
        try:
            reader, writer = self._idle.pop() if self._idle else await self._connect()
            writer.write(request)
            await self._read(reader, answer, expected, began)
            self._idle.append((reader, writer))
        except (OSError, EOFError, ValueError) as error:
            answer.wrong = f"broken: {error!r}"
        answer.ended_at = time.monotonic()
        answer.took_s = answer.ended_at - began
        self.answers.append(answer)
        return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    async def _read(
        self, reader: asyncio.StreamReader, answer: Answer, expected: str, began: float
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        answer.status = int(head.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        if answer.status != 200:
            body = json.loads(await reader.readexactly(int(fields["content-length"])))
            answer.first_s = time.monotonic() - began
            answer.code = body["error"]["code"]
            answer.retry_after = fields.get("retry-after", "")
            return
        text = []
        while length := int(await reader.readline(), 16):
            chunk = await reader.readexactly(length + 2)
            answer.first_s = answer.first_s or time.monotonic() - began
            text.append(chunk[:-2])
        await reader.readline()
        answer.wrong = _why_wrong(b"".join(text), expected)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def _why_wrong(stream: bytes, expected: str) -> str:
    """Empty if these server-sent events are the whole text and its end."""
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return "ends without [DONE]"
    text = ""
    for event in events[:-1]:
        body = json.loads(event)
        if "error" in body:
            return f"error in the stream: {body['error']}"
        text += "".join(choice["text"] for choice in body["choices"])
    return "" if text == expected else f"wrong text: {text!r}"


class Overload:
    """One run on one fleet."""

    def __init__(
        self,
        fleet: ChaosFleet,
        *,
        warm_s: float = 3.0,
        peak_s: float = 10.0,
        is_timed: bool = True,
    ) -> None:
        """Not `is_timed`: what depends on who else uses the machine is measured, not judged."""
        self._fleet = fleet
        self._is_timed = is_timed
        self._warm_s = warm_s
        self._peak_s = peak_s
        self.problems: list[str] = []
        self.found: dict[str, Any] = {}
        self._rss: dict[str, dict[str, float]] = {}

    async def run(self, seconds: float) -> None:
        """Raises nothing for what is wrong: see `problems`."""
        load = Load(self._fleet.port)
        await load.closed(PLACES, self._warm_s)
        quiet = await self._first_s(load)
        self._rss["at rest"] = self._sizes()
        peak = await self._peak(load)
        load.answers = []
        stopping = asyncio.Event()
        watcher = asyncio.create_task(self._watch(stopping, seconds / 2))
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            last = await load.opened(TIMES * peak / TOKENS, seconds, tasks)
            stopping.set()
            queued = await watcher
            self._rss["at the end"] = self._sizes()
            if self._is_timed:
                await self._judge_rest(last + AFTER_S)
        await self._judge_rest(time.monotonic() + PATIENCE_S)
        self._judge(load.answers, peak, began, seconds)
        await self._judge_after(load, quiet)
        self.found |= {"peak_tokens_per_s": round(peak), "most_queued": queued}
        self._judge_rss(seconds)
        await load.close()

    async def _peak(self, load: Load) -> float:
        """Tokens a second of a fleet that is full and has no queue to speak of."""
        load.answers = []
        began = time.monotonic()
        await load.closed(PLACES, self._peak_s)
        took = time.monotonic() - began
        self.problems += [a.wrong for a in load.answers if a.wrong][:3]
        return sum(a.status == 200 for a in load.answers) * TOKENS / took

    async def _first_s(self, load: Load) -> float:
        """Median seconds to the first token, one request at a time."""
        return sorted([(await load.ask(brief=True)).first_s for _ in range(11)])[5]

    async def _watch(self, stopping: asyncio.Event, half_s: float) -> int:
        """The longest queue that was seen. Measures RSS when half of the time is over."""
        most = 0.0
        began = time.monotonic()
        while not stopping.is_set():
            most = max(most, await asyncio.to_thread(self._fleet.metric, "baton_queued_choices"))
            if time.monotonic() - began >= half_s:
                self._rss.setdefault("half way", self._sizes())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), 1.0)
        return int(most)

    def _judge(self, answers: list[Answer], peak: float, began: float, seconds: float) -> None:
        good = [a for a in answers if a.status == 200 and not a.wrong]
        if not good:
            self.problems.append("nothing was served")
            return
        refused = [a for a in answers if a.status == 503]
        first = began + min(a.took_s for a in good)
        inside = sum(first < a.ended_at <= began + seconds for a in good)
        useful = inside * TOKENS / (began + seconds - first)
        codes = Counter(a.code for a in refused)
        self.found |= {
            "asked": len(answers),
            "asked_per_s": round(len(answers) / seconds, 1),
            "served": len(good),
            "refused": dict(codes),
            "useful_tokens_per_s": round(useful),
            "share_of_peak": round(useful / peak, 3),
            "first_token_s": _spread([a.first_s for a in good]),
            "refusal_s": {
                code: _spread([a.first_s for a in refused if a.code == code]) for code in codes
            },
        }
        self._time(useful >= LEAST * peak, f"{useful:.0f} tokens/s of {peak:.0f} at the peak")
        odd = [a for a in answers if a.wrong or a.status not in (200, 503)]
        self._demand(not odd, f"{len(odd)} answers are wrong: {odd[:3]}")
        self._demand(set(codes) <= CODES, f"refused for {dict(codes)}")
        silent = [a for a in refused if not a.retry_after.isdigit() or int(a.retry_after) < 1]
        self._demand(not silent, f"{len(silent)} refusals without Retry-After")
        late = [a for a in answers if a.first_s > QUEUE_S + LATE_S]
        self._time(not late, f"{len(late)} answers later than {QUEUE_S + LATE_S:g} s")

    async def _judge_rest(self, by: float) -> None:
        """By then nothing is left in any process."""
        while left := await asyncio.to_thread(self._fleet.leftovers):
            if time.monotonic() >= by:
                self.problems += [f"left: {text}" for text in left]
                return
            await asyncio.sleep(0.05)

    async def _judge_after(self, load: Load, quiet: float) -> None:
        """Everything is as it was."""
        eligible = await asyncio.to_thread(self._fleet.eligible)
        names = {process.name for process in self._fleet.workers()}
        self._demand(names == set(eligible), f"eligible are {sorted(eligible)}")
        first = await self._first_s(load)
        self._time(first < 2 * quiet + 0.02, f"first token {first:.3f} s, was {quiet:.3f} s")
        self.found["quiet_first_token_s"] = [round(quiet, 4), round(first, 4)]
        self._demand(not [a for a in load.answers[-11:] if a.wrong or a.status != 200], "after it")

    def _sizes(self) -> dict[str, float]:
        """RSS in MB of every process."""
        names = ["router", *(process.name for process in self._fleet.workers())]
        return {n: round(sample(self._fleet.process(n).pid, 0.0).rss_mb, 1) for n in names}

    def _judge_rss(self, seconds: float) -> None:
        self.found["rss_mb"] = self._rss
        if seconds < FULL_S:
            return
        for name, was in self._rss["half way"].items():
            grown = self._rss["at the end"][name] - was
            self._demand(grown <= MORE_MB, f"{name} still grew by {grown:.1f} MB")

    def _time(self, holds: bool, problem: str) -> None:
        self._demand(holds or not self._is_timed, problem)

    def _demand(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


def _spread(values: list[float]) -> list[float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(values)
    if not ordered:
        return []
    return [
        round(ordered[min(len(ordered) - 1, int(len(ordered) * q))], 3) for q in (0.5, 0.99, 1.0)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--transport", default="shm", choices=TRANSPORTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(prefix="overload-") as folder,
        ChaosFleet(Path(folder), args.transport, settings=SETTINGS) as fleet,
    ):
        run = Overload(fleet)
        try:
            asyncio.run(run.run(args.seconds))
        except KeyboardInterrupt:
            run.problems.append("stopped")
        found = {"seconds": args.seconds, **run.found, "problems": run.problems}
    text = json.dumps(found, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(bool(found["problems"]))


if __name__ == "__main__":
    sys.exit(main())

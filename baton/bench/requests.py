"""`baton bench requests`: what a whole disaggregated request costs each process.

Two tokens each, so that both legs run and a KV handle changes hands. Two floors answer the same
client in the same round: a server with a constant, so HTTP without a router; and a bare router over
the same nats-server, so what the libraries under Baton's router take for the same way.
"""

import argparse
import asyncio
import json
import time
from typing import Final

from baton.bench.bare_router import bare_router
from baton.bench.canned import floor
from baton.bench.client import Answer, chat, closed_loop
from baton.bench.fleet import OTHER_COLUMNS, Fleet, Process, Shape, running
from baton.bench.prompts import PROMPTS, texts
from baton.bench.report import Row, percentile, progress
from protocol.errors import ConfigError

TITLE = (
    "CPU-µs per request of two tokens; medians of the rounds. floor: a constant answer; "
    "bare router: the same libraries and messages, no decisions"
)
COLUMNS = {
    "prompt_tokens": "prompt tokens",
    "router": "router",
    "floor": "floor",
    "bare": "bare router",
    "ratio": "router / floor",
    **OTHER_COLUMNS,
    "rate": "requests/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99",
    "rss_mb": "router RSS, MB",
}
_FEWER: Final = {"short": 1, "2k": 4, "32kb": 10, "8k": 10}
"""Long prompts cost more: so many times fewer of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=2_000, help="in a round (short prompts)")
    parser.add_argument("--prompts", default=",".join(PROMPTS), metavar="P,P", help="which")
    parser.add_argument("--concurrency", default="32,128", metavar="N,N", help="requests at once")
    parser.add_argument("--stream", action="store_true", help="ask for streams")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    prompts = [name for name in args.prompts.split(",") if name]
    unknown = sorted(set(prompts) - set(PROMPTS))
    if unknown or not prompts:
        raise ConfigError(f"--prompts takes {', '.join(PROMPTS)}, not {args.prompts!r}")
    prompt_of = texts()
    cases = [(name, int(text)) for name in prompts for text in args.concurrency.split(",")]
    rows.extend(Row(f"{name}, {concurrency} at once") for name, concurrency in cases)
    shape = Shape.of(args)
    async with (
        running(shape) as fleet,
        floor(0.0) as canned,
        bare_router(fleet.nats_port) as bare,
    ):
        await closed_loop(fleet.port, [chat("warm up", 2, stream=True)] * 500, 32)
        serial = 0
        for number in range(args.rounds):
            for (name, concurrency), row in zip(cases, rows, strict=True):
                if stop.is_set():
                    return
                progress(f"round {number + 1} of {args.rounds}: {row.case}")
                count = max(args.requests // _FEWER[name], concurrency)
                asked = [
                    chat(f"{serial + i} {prompt_of[name]}", 2, stream=args.stream)
                    for i in range(count)
                ]
                serial += count
                floor_us = await _each_us(*canned, asked, concurrency)
                bare_us = await _each_us(*bare, asked, concurrency)
                figures = await _of_fleet(fleet, asked, concurrency)
                ratio = figures["router"] / floor_us
                row.add(**figures, floor=floor_us, bare=bare_us, ratio=ratio)


async def _each_us(port: int, process: Process, asked: list[bytes], concurrency: int) -> float:
    before = process.cpu_ns()
    await closed_loop(port, asked, concurrency)
    return (process.cpu_ns() - before) / 1e3 / len(asked)


async def _of_fleet(fleet: Fleet, asked: list[bytes], concurrency: int) -> dict[str, float]:
    before, began = fleet.used(), time.perf_counter()
    answers = await closed_loop(fleet.port, asked, concurrency)
    wall, after = time.perf_counter() - began, fleet.used()
    times = [answer.whole_s for answer in answers]
    return {
        **before.each_us(after, len(asked)),
        **_prompt_tokens(answers[0]),
        "rate": len(asked) / wall,
        "p50_ms": percentile(times, 0.5) * 1e3,
        "p99_ms": percentile(times, 0.99) * 1e3,
        "rss_mb": fleet.kinds["router"].rss_mb(),
    }


def _prompt_tokens(answer: Answer) -> dict[str, float]:
    """As the router counted; streams do not say."""
    if not answer.body:
        return {}
    return {"prompt_tokens": json.loads(answer.body)["usage"]["prompt_tokens"]}

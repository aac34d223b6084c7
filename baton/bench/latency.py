"""`baton bench latency`: what Baton adds to the time to the first token when there is little to do.

One ordinary keep-alive client, one question at a time with a pause between; the engine takes no
time. The floors answer the same client from a constant, in the same round: a bare server, and one
that asks another process over the same nats-server for each answer.
"""

import argparse
import asyncio
from typing import Final

from baton.bench.canned import floor
from baton.bench.canned_bus import bus_way
from baton.bench.client import Answer, Client, chat
from baton.bench.fleet import OTHER_COLUMNS, Shape, running
from baton.bench.report import Row, percentile, progress

TITLE = "Time to the first token at low load, ms; CPU-µs per request"
COLUMNS = {
    "added_p50_ms": "added, p50",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "floor_p50_ms": "floor's p50",
    "floor_p99_ms": "floor's p99",
    "bus_floor_p50_ms": "floor over NATS, p50",
    "slow": "above 30 ms, %",
    "router": "router, µs",
    **OTHER_COLUMNS,
}
_SLOW_S: Final = 0.03
"""A client that delays its acknowledgements makes a 40 ms step of a server that waits for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=300, help="in a round")
    parser.add_argument("--gap-ms", type=float, default=10.0, help="between two questions")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    row = Row(f"a question each {args.gap_ms:g} ms")
    rows.append(row)
    shape = Shape.of(args)
    async with (
        running(shape) as fleet,
        floor(0.0) as (port, _),
        bus_way(fleet.nats_port) as bus_port,
    ):
        await _ask(fleet.port, 30, 0.0)
        for number in range(args.rounds):
            if stop.is_set():
                return
            progress(f"round {number + 1} of {args.rounds}")
            bare = [answer.first_s for answer in await _ask(port, args.requests, args.gap_ms)]
            over_bus = [
                answer.first_s for answer in await _ask(bus_port, args.requests, args.gap_ms)
            ]
            before = fleet.used()
            answers = await _ask(fleet.port, args.requests, args.gap_ms)
            after = fleet.used()
            first = [answer.first_s for answer in answers]
            row.add(
                added_p50_ms=(percentile(first, 0.5) - percentile(bare, 0.5)) * 1e3,
                p50_ms=percentile(first, 0.5) * 1e3,
                p99_ms=percentile(first, 0.99) * 1e3,
                floor_p50_ms=percentile(bare, 0.5) * 1e3,
                floor_p99_ms=percentile(bare, 0.99) * 1e3,
                bus_floor_p50_ms=percentile(over_bus, 0.5) * 1e3,
                slow=100.0 * sum(seconds > _SLOW_S for seconds in first) / len(first),
                **before.each_us(after, len(first)),
            )


async def _ask(port: int, count: int, gap_ms: float) -> list[Answer]:
    client = await Client.connect(port)
    answers = []
    try:
        for i in range(count):
            text = f"request {i}: the quick brown fox jumps over the lazy dog"
            answers.append(await client.ask(chat(text, 2, stream=True)))
            await asyncio.sleep(gap_ms / 1e3)
    finally:
        client.close()
    return answers

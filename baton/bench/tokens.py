"""`baton bench tokens`: what a paced streamed token costs each process.

Streams that get one token a step, from decode workers whose steps do not coincide. Floors, in the
same round and in as many groups as there are decode workers: a server that writes a constant at the
same pace to the same client, by its own clock or for each frame off the same nats-server.
"""

import argparse
import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from baton.bench.canned import floor
from baton.bench.canned_bus import bus_floor
from baton.bench.client import Answer, Client, chat, closed_loop
from baton.bench.fleet import OTHER_COLUMNS, Fleet, Process, Shape, running
from baton.bench.prompts import text_of
from baton.bench.report import Row, percentile, progress

TITLE = (
    "CPU-µs per token; medians of the rounds. floor: a bare uvloop writer at the same pace, by its "
    "own clock and off NATS"
)
COLUMNS = {
    "router": "router",
    "floor": "floor",
    "over": "router - floor",
    "ratio": "router / floor",
    "bus_floor": "floor off NATS",
    **OTHER_COLUMNS,
    "nats_floor": "nats-server's floor",
    "gap_p50_ms": "gap p50, ms",
    "gap_p99_ms": "p99",
    "floor_gap_p99_ms": "floor's p99",
    "lag_ms": "loop lag below, ms",
    "rss_mb": "router RSS, MB",
}

_TOKEN_BYTES: Final = 32
"""Of a frame, about, for each stream that got a token."""
_LAG: Final = re.compile(r"^baton_loop_lag_seconds_bucket\{(.*)\} (\S+)$", re.MULTILINE)
_BOUND: Final = re.compile(r'le="([^"]+)"')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", default="64,256", metavar="N,N", help="streams at once")
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument(
        "--long", type=int, default=0, metavar="TOKENS", help="a prompt so long each second besides"
    )
    parser.add_argument("--step-ms", type=float, default=20.0, help="one token each")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    counts = [int(text) for text in args.streams.split(",")]
    shape = Shape.of(args, step_ms=args.step_ms)
    workers = f", {args.decode} decode workers" if args.decode > 1 else ""
    workers += f", and {args.long} tokens each second" if args.long else ""
    long = chat(text_of(args.long), 1, stream=False) if args.long else b""
    rows.extend(Row(f"{count} streams{workers}") for count in counts)
    async with running(shape) as fleet, floor(args.step_ms, groups=args.decode) as (port, process):
        await closed_loop(fleet.port, [chat("warm up", 2, stream=True)] * 32, 8)
        for number in range(args.rounds):
            for count, row in zip(counts, rows, strict=True):
                if stop.is_set():
                    return
                progress(f"round {number + 1} of {args.rounds}: {row.case}")
                asked = [chat(f"stream {i}: go on", args.tokens, stream=True) for i in range(count)]
                figures = await _of_floor(port, process, asked, args.tokens)
                figures |= await _of_bus_floor(fleet, args, asked)
                async with _besides(fleet.port, long):
                    figures |= await _of_fleet(fleet, asked, args.tokens)
                figures["over"] = figures["router"] - figures["floor"]
                figures["ratio"] = figures["router"] / figures["floor"]
                row.add(**figures)


@asynccontextmanager
async def _besides(port: int, request: bytes) -> AsyncIterator[None]:
    """While the block runs, `request` is asked once a second, whether it is answered or not."""

    async def ask() -> None:
        client = await Client.connect(port)
        try:
            await client.ask(request)
        finally:
            client.close()

    async def each_second() -> None:
        while True:
            tasks.create_task(ask())
            await asyncio.sleep(1.0)

    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(each_second()) if request else None
        yield
        if asking is not None:
            asking.cancel()


async def _lag_counts(port: int) -> list[tuple[float, float]]:
    """Bound and count, from the lowest bound on, of how late the routers' loops were."""
    client = await Client.connect(port)
    try:
        page = (await client.ask(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n")).body.decode()
    finally:
        client.close()
    counts: dict[float, float] = {}
    for labels, count in _LAG.findall(page):
        bound = float(_BOUND.search(labels)[1])  # type: ignore[index]
        counts[bound] = counts.get(bound, 0.0) + float(count)
    return sorted(counts.items())


def _lag_ms(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> float:
    """The lowest bound below which all looks between the two were."""
    fresh = [(b[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
    return next(bound for bound, count in fresh if count == fresh[-1][1]) * 1e3


async def _of_floor(
    port: int, process: Process, asked: list[bytes], num_tokens: int
) -> dict[str, float]:
    before = process.cpu_ns()
    answers = await closed_loop(port, asked, len(asked))
    used = process.cpu_ns() - before
    return {
        "floor": used / 1e3 / (len(asked) * num_tokens),
        "floor_gap_p99_ms": percentile(_gaps(answers), 0.99) * 1e3,
    }


async def _of_bus_floor(
    fleet: Fleet, args: argparse.Namespace, asked: list[bytes]
) -> dict[str, float]:
    nats, frame_bytes = fleet.kinds["nats"], _TOKEN_BYTES * len(asked) // args.decode
    async with bus_floor(
        fleet.nats_port, args.step_ms, groups=args.decode, frame_bytes=frame_bytes
    ) as (port, process):
        before = process.cpu_ns(), nats.cpu_ns()
        await closed_loop(port, asked, len(asked))
        after = process.cpu_ns(), nats.cpu_ns()
    units = 1e3 * len(asked) * args.tokens
    return {
        "bus_floor": (after[0] - before[0]) / units,
        "nats_floor": (after[1] - before[1]) / units,
    }


async def _of_fleet(fleet: Fleet, asked: list[bytes], num_tokens: int) -> dict[str, float]:
    lags = await _lag_counts(fleet.port)
    before = fleet.used()
    answers = await closed_loop(fleet.port, asked, len(asked))
    after = fleet.used()
    gaps = _gaps(answers)
    return {
        **before.each_us(after, len(asked) * num_tokens),
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
        "lag_ms": _lag_ms(lags, await _lag_counts(fleet.port)),
        "rss_mb": fleet.kinds["router"].rss_mb(),
    }


def _gaps(answers: list[Answer]) -> list[float]:
    return [gap for answer in answers for gap in answer.gaps_s]

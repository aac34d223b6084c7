"""`baton bench tokens`: what a paced streamed token costs each process.

Streams that get one token a step, from decode workers whose steps do not coincide; the floor is a
server that writes a constant at the same pace to the same client, in the same round.
"""

import argparse
import asyncio

from baton.bench.canned import floor
from baton.bench.client import Answer, chat, closed_loop
from baton.bench.fleet import ROLES, Fleet, Process, Shape, running
from baton.bench.report import Row, percentile, progress

TITLE = "CPU-µs per token; medians of the rounds. floor: a bare uvloop writer at the same pace"
COLUMNS = {
    "router": "router",
    "floor": "floor",
    "over": "router - floor",
    "ratio": "router / floor",
    "nats": "nats-server",
    "prefill": "prefill",
    "decode": "decode",
    "total": "total",
    "gap_p50_ms": "gap p50, ms",
    "gap_p99_ms": "p99",
    "floor_gap_p99_ms": "floor's p99",
    "rss_mb": "router RSS, MB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", default="64,256", metavar="N,N", help="streams at once")
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="one token each")


async def measure(args: argparse.Namespace, stop: asyncio.Event, rows: list[Row]) -> None:
    counts = [int(text) for text in args.streams.split(",")]
    shape = Shape(
        step_ms=args.step_ms, prefill=args.prefill, decode=args.decode, processes=args.processes
    )
    workers = f", {args.decode} decode workers" if args.decode > 1 else ""
    rows.extend(Row(f"{count} streams{workers}") for count in counts)
    async with running(shape) as fleet, floor(args.step_ms) as (port, process):
        await closed_loop(fleet.port, [chat("warm up", 2, stream=True)] * 32, 8)
        for number in range(args.rounds):
            for count, row in zip(counts, rows, strict=True):
                if stop.is_set():
                    return
                progress(f"round {number + 1} of {args.rounds}: {row.case}")
                asked = [chat(f"stream {i}: go on", args.tokens, stream=True) for i in range(count)]
                figures = await _of_floor(port, process, asked, args.tokens)
                figures |= await _of_fleet(fleet, asked, args.tokens)
                figures["over"] = figures["router"] - figures["floor"]
                figures["ratio"] = figures["router"] / figures["floor"]
                row.add(**figures)


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


async def _of_fleet(fleet: Fleet, asked: list[bytes], num_tokens: int) -> dict[str, float]:
    before = fleet.cpu_ns()
    answers = await closed_loop(fleet.port, asked, len(asked))
    after = fleet.cpu_ns()
    units = len(asked) * num_tokens
    figures = {role: (after[role] - before[role]) / 1e3 / units for role in ROLES}
    gaps = _gaps(answers)
    return {
        **figures,
        "total": sum(figures.values()),
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
        "rss_mb": fleet.kinds["router"].rss_mb(),
    }


def _gaps(answers: list[Answer]) -> list[float]:
    return [gap for answer in answers for gap in answer.gaps_s]

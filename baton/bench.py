"""`baton bench`: CPU per token and per request of every process of a simulated fleet.

`baton bench transfer` is another matter (`bench_transfer`): no fleet, two processes and KV blocks.
So is `baton bench engine` (`bench_engine`): no fleet, one process and `transformers`.

Wall-clock figures depend on who else uses the machine; CPU-µs per unit repeat. The fleet is a real
one (`baton up --engine simulated`), the load comes from this process over plain sockets.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from baton import bench_engine, bench_transfer
from protocol.errors import ConfigError

_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")
_START_TIMEOUT_S: Final = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=["tokens", "requests", "transfer", "engine"],
        default="tokens",
    )
    parser.add_argument("--streams", type=int, default=64, help="streams, or requests at once")
    parser.add_argument("--tokens", type=int, default=250, help="tokens of a stream (tokens)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="one token each (tokens)")
    parser.add_argument("--requests", type=int, default=2_000, help="two tokens each (requests)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", metavar="F", default="", help="write the rows there as well")
    bench_transfer.add_arguments(parser)
    bench_engine.add_arguments(parser)


async def run_bench(args: argparse.Namespace, stop: asyncio.Event) -> int:
    """Start a fleet, load it `--runs` times, print a table. Raises ConfigError."""
    if args.what == "engine":
        return await bench_engine.run_engine(args, stop)
    if args.what == "transfer":
        return await bench_transfer.run_transfers(args, stop)
    if min(args.streams, args.tokens, args.requests, args.runs) < 1:
        raise ConfigError("--streams, --tokens, --requests and --runs must be at least 1")
    measure = {"tokens": _paced_tokens, "requests": _requests}[args.what]
    step_ms = args.step_ms if args.what == "tokens" else 0.0
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as state:
        fleet = await _start(Path(state), step_ms)
        try:
            rows = []
            for number in range(args.runs):
                if stop.is_set():
                    break
                rows.append(await _measured(Path(state), measure, args))
                print(f"run {number + 1} of {args.runs}", file=sys.stderr, flush=True)
        finally:
            fleet.terminate()
            await fleet.wait()
    _print(args.what, rows)
    if args.json:
        _write_json(Path(args.json), rows)
    return 0


def _write_json(path: Path, rows: list[dict[str, float]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


async def _start(state: Path, step_ms: float) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "baton", "up", "--engine=simulated", "--port=0"]
    settings = {
        "worker.sim_step_ms": step_ms,
        "worker.sim_prefill_tokens_per_s": 0,
        "worker.max_running": 512,
        "router.log_level": "warning",
        "worker.log_level": "warning",
    }
    sets = [f"--set={name}={value}" for name, value in settings.items()]
    process = await asyncio.create_subprocess_exec(
        *command, f"--state-dir={state}", *sets, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while line := await process.stdout.readline():
                if b"Baton is up" in line:
                    return process
    except TimeoutError:
        process.terminate()
    raise ConfigError("the fleet did not start; run `baton up --engine simulated` to see why")


async def _measured(
    state: Path,
    measure: "Callable[[int, argparse.Namespace], Awaitable[dict[str, float]]]",
    args: argparse.Namespace,
) -> dict[str, float]:
    processes: list[dict[str, Any]] = json.loads((state / "processes.json").read_text())
    port = next(entry["port"] for entry in processes if entry["role"] == "router")
    before = {entry["role"]: _cpu_s(entry["pid"]) for entry in processes}
    row = await measure(port, args)
    units = row.pop("units")
    for entry in processes:
        used = _cpu_s(entry["pid"]) - before[entry["role"]]
        row[f"{entry['role']} µs"] = used / units * 1e6
        if entry["role"] == "router":
            row["router RSS MB"] = _rss_mb(entry["pid"])
    return row


async def _paced_tokens(port: int, args: argparse.Namespace) -> dict[str, float]:
    async with asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(_ask(port, f"stream {i}: ", args.tokens)) for i in range(args.streams)
        ]
    times = sorted(stream.result() for stream in streams)
    return {
        "units": args.streams * args.tokens,
        "p50 s": times[len(times) // 2],
        "max s": times[-1],
    }


async def _requests(port: int, args: argparse.Namespace) -> dict[str, float]:
    left = iter(range(args.requests))
    times: list[float] = []

    async def one_client() -> None:
        for i in left:  # shared by all clients
            times.append(  # noqa: PERF401
                await _ask(port, f"request {i} of a short prompt", 2)
            )

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(args.streams, 32)):
            tasks.create_task(one_client())
    wall = time.perf_counter() - began
    times.sort()
    return {
        "units": args.requests,
        "req/s": args.requests / wall,
        "p50 ms": times[len(times) // 2] * 1e3,
        "p99 ms": times[int(len(times) * 0.99)] * 1e3,
    }


async def _ask(port: int, prompt: str, num_tokens: int) -> float:
    """One streamed completion on a connection of its own; seconds until its end."""
    body = json.dumps(
        {"model": "demo", "prompt": prompt, "max_tokens": num_tokens, "stream": True}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        tail = b""
        while data := await reader.read(65_536):
            tail = (tail + data)[-64:]
        if b"[DONE]" not in tail:
            raise ConfigError(f"an answer was cut short: {tail!r}")
    finally:
        writer.close()
    return time.perf_counter() - began


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _print(what: str, rows: list[dict[str, float]]) -> None:
    if not rows:
        return
    print(f"\nCPU per {'token' if what == 'tokens' else 'request'}; median of {len(rows)} runs")
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = min(values), max(values)
        print(f"  {name:16} {statistics.median(values):10.2f}   ({low:.2f} to {high:.2f})")

"""`baton bench transfer`: how fast KV blocks move between two processes, and what that costs.

Each transport goes through Baton's own port, with the check of the lease word, between two fresh
processes; beside them, in the same rounds, stands what the machine and the library do without us.
A round goes through all of them in turn, so that a busy minute harms all alike. Best is what a path
can do, median what it did here.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from baton.bench.report import check_json, progress, until_stopped, write_json
from baton.bench.transfer_peer import BLOCK_BYTES, NUM_BLOCKS, NUM_SCATTERED
from protocol.errors import ConfigError

_START_S: Final = 60.0
_MEASURE_S: Final = 120.0
_IDLE_S: Final = 2.0
_LINE_BYTES: Final = 1 << 20

PULLS: Final = {"contiguous": 4, "scattered": 4, "one": 200}
"""Of each kind in one round."""
_BYTES: Final = {
    "contiguous": NUM_BLOCKS * BLOCK_BYTES,
    "scattered": NUM_SCATTERED * BLOCK_BYTES,
    "one": BLOCK_BYTES,
}


class Measured(NamedTuple):
    """One way for blocks to come here."""

    transport: str
    """Of Baton's port; empty: a floor."""
    environ: dict[str, str]
    text: str


PATHS: Final[dict[str, Measured]] = {
    "memcpy": Measured("", {}, "floor: one process"),
    "socket": Measured("", {}, "floor: loopback"),
    "nixl-bare": Measured("", {}, "floor: the library"),
    "shm": Measured("shm", {}, ""),
    "tcp": Measured("tcp", {}, ""),
    "nixl": Measured("nixl", {}, "as UCX chooses"),
    "nixl-tcp": Measured("nixl", {"UCX_TLS": "tcp"}, "UCX_TLS=tcp"),
    "ucx": Measured("ucx", {}, ""),
}


@dataclass(slots=True)
class Row:
    """What one path did in all rounds."""

    name: str
    failed: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By kind of pull, of each pull."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """By kind, both processes, all pulls."""
    idle_percent: float | None = None
    """Of one core, of the started process that uses more."""


class PeerFailed(Exception):
    """A process of the measurement says that it cannot go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paths", default=",".join(PATHS), metavar="P,P", help="which; default: all"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all paths")
    parser.add_argument("--json", metavar="F", default="", help="write the seconds of every pull")


async def run_transfers(args: argparse.Namespace, stop: asyncio.Event) -> int:
    """Measure, print a table. Raises ConfigError. Stopped early, it prints what it has."""
    rows = [Row(name) for name in _checked(args)]
    stopped = await until_stopped(_rounds(rows, args.repeats), stop)
    print(table(rows))
    if args.json:
        write_json(args.json, _document(rows))
    return 130 if stopped else 0


def _checked(args: argparse.Namespace) -> list[str]:
    """The paths to measure. Raises ConfigError before anything is measured."""
    names = [name.strip() for name in args.paths.split(",") if name.strip()]
    unknown = [name for name in names if name not in PATHS]
    if unknown or not names:
        raise ConfigError(f"--paths: {', '.join(unknown) or 'none'}; known: {', '.join(PATHS)}")
    if args.repeats < 1:
        raise ConfigError("--repeats must be at least 1")
    check_json(args.json)
    return names


async def _rounds(rows: Sequence[Row], repeats: int) -> None:
    for number in range(repeats):
        for row in rows:
            if row.failed:
                continue
            progress(f"round {number + 1} of {repeats}: {row.name}")
            try:
                async with asyncio.timeout(_START_S + _MEASURE_S):
                    await _round(row)
            except PeerFailed as error:
                row.failed = str(error)
            except TimeoutError:
                row.failed = "did not end in time"


async def _round(row: Row) -> None:
    way = PATHS[row.name]
    asked = {"path": row.name, "transport": way.transport}
    async with (
        _peer({**asked, "role": "source"}, way.environ) as (source, said),
        _peer({**asked, "role": "sink", "said": said}, way.environ) as (sink, _),
    ):
        if row.idle_percent is None and way.transport:
            row.idle_percent = await _idle([source, sink])
        for shape, count in PULLS.items():
            before = await _ask(source, "cpu")
            found = await _ask(sink, "measure", shape, count)
            at_source = await _ask(source, "cpu") - before
            row.seconds.setdefault(shape, []).extend(found["seconds"])
            row.cpu_s[shape] = row.cpu_s.get(shape, 0.0) + found["cpu_s"] + at_source


async def _idle(peers: Sequence[asyncio.subprocess.Process]) -> float:
    before = [await _ask(peer, "cpu") for peer in peers]
    await asyncio.sleep(_IDLE_S)
    used = [await _ask(peer, "cpu") - past for peer, past in zip(peers, before, strict=True)]
    return float(max(used)) / _IDLE_S * 100


@asynccontextmanager
async def _peer(
    options: dict[str, Any], environ: dict[str, str]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A process of the measurement, and what it says of itself. It ends with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "baton.bench.transfer_peer",
        json.dumps(options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **environ},
        limit=_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is ours to hear
    )
    try:
        said = await _hear(process)
        yield process, said["said"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ask(process: asyncio.subprocess.Process, name: str, *arguments: object) -> Any:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        await process.stdin.drain()
    except OSError:
        pass  # it died: what it said before comes next
    return (await _hear(process))["answer"]


async def _hear(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Raises PeerFailed."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise PeerFailed("a process of the measurement died")
    heard: dict[str, Any] = json.loads(line)
    if "error" in heard:
        raise PeerFailed(heard["error"])
    return heard


def table(rows: Sequence[Row]) -> str:
    """Markdown, so that it can be pasted into a page."""
    sizes = f"{_BYTES['contiguous'] >> 20} MiB in a row", f"{NUM_SCATTERED} x 64 KiB scattered"
    lines = [
        "",
        f"| path | {sizes[0]}, GB/s | {sizes[1]}, GB/s | one 64 KiB, us "
        "| CPU of both, us per MiB / per block | idle, % of a core | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, "", "Median / best; GB = 10^9 bytes."])


def _line(row: Row) -> str:
    text = PATHS[row.name].text
    if row.failed or set(row.seconds) != set(PULLS):
        return f"| {row.name} | - | - | - | - | - | {row.failed or 'not measured'} |"
    rates = []
    for shape in ("contiguous", "scattered"):
        times = row.seconds[shape]
        median, best = (_BYTES[shape] / t / 1e9 for t in (statistics.median(times), min(times)))
        rates.append(f"{median:.2f} / {best:.2f}")
    ones = row.seconds["one"]
    latency = f"{statistics.median(ones) * 1e6:.1f} / {min(ones) * 1e6:.1f}"
    cpu = f"{_cpu_us(row, 'contiguous') / 64:.0f} / {_cpu_us(row, 'one'):.0f}"
    idle = "" if row.idle_percent is None else f"{row.idle_percent:.1f}"
    return f"| {row.name} | {rates[0]} | {rates[1]} | {latency} | {cpu} | {idle} | {text} |"


def _cpu_us(row: Row, shape: str) -> float:
    """Of one pull, both processes."""
    return row.cpu_s[shape] / len(row.seconds[shape]) * 1e6


def _document(rows: Sequence[Row]) -> dict[str, Any]:
    """Seconds of every pull, for those who want other figures."""
    return {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
        "bytes": _BYTES,
        "paths": [
            {
                "path": row.name,
                "failed": row.failed,
                "seconds": row.seconds,
                "cpu_us": {shape: _cpu_us(row, shape) for shape in row.cpu_s},
                "idle_percent": row.idle_percent,
            }
            for row in rows
        ],
    }

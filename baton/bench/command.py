"""The command line of `baton bench`, and what its measurements have in common."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from baton.bench import engine, latency, paths, requests, scheduler, tokens, transfer
from baton.bench.fleet import MOCK
from baton.bench.report import Row, check_json, document, table, until_stopped, write_json
from protocol.errors import ConfigError


class _Figures(NamedTuple):
    """A measurement whose result is rows of figures."""

    text: str
    title: str
    columns: Mapping[str, str]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, asyncio.Event, list[Row]], Awaitable[None]]
    has_fleet: bool = True


_FIGURES = {
    "tokens": _Figures(
        "CPU of each process per paced streamed token",
        tokens.TITLE, tokens.COLUMNS, tokens.add_arguments, tokens.measure,
    ),
    "requests": _Figures(
        "CPU of each process per disaggregated request",
        requests.TITLE, requests.COLUMNS, requests.add_arguments, requests.measure,
    ),
    "latency": _Figures(
        "added time to the first token at low load",
        latency.TITLE, latency.COLUMNS, latency.add_arguments, latency.measure,
    ),
    "scheduler": _Figures(
        "CPU of the scheduler alone per event",
        scheduler.TITLE, scheduler.COLUMNS, scheduler.add_arguments, scheduler.measure,
        has_fleet=False,
    ),
    "paths": _Figures(
        "CPU of the router's own code per token and request, beside what nobody could save",
        paths.TITLE, paths.COLUMNS, paths.add_arguments, paths.measure,
        has_fleet=False,
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, kind in _FIGURES.items():
        one = kinds.add_parser(name, help=kind.text, description=kind.text)
        kind.add_arguments(one)
        one.add_argument("--rounds", type=int, default=5, help="the table shows their medians")
        one.add_argument("--json", metavar="F", default="", help="write every round there as well")
        if kind.has_fleet:
            _add_fleet(one)
    one = kinds.add_parser("transfer", help="every transport beside memcpy, a socket and bare NIXL")
    transfer.add_arguments(one)
    one = kinds.add_parser("engine", help="the torch engine's steps beside transformers")
    engine.add_arguments(one)


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=["simulated", "openai"],
        default="simulated",
        help="simulated: Baton's own, in its workers; openai: a plain mock OpenAI server beside "
        "each worker, driven as vLLM would be: what proxies are measured in front of",
    )
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers")
    parser.add_argument(
        "--processes", type=int, default=0, metavar="N", help="routers; 0: one without a parent"
    )


async def run_bench(args: argparse.Namespace, stop: asyncio.Event) -> int:
    """Measure, print a table. Raises ConfigError. Stopped early, it prints what it has."""
    if args.what == "engine":
        return await engine.run_engine(args, stop)
    if args.what == "transfer":
        return await transfer.run_transfers(args, stop)
    kind = _FIGURES[args.what]
    _check(args)
    rows: list[Row] = []
    stopped = await until_stopped(kind.measure(args, stop, rows), stop)
    columns = dict(kind.columns)
    if getattr(args, "engine", "") != "openai":
        columns.pop(MOCK, None)
    print(table(kind.title, rows, columns))
    if args.json:
        write_json(args.json, document(args.what, rows))
    return 130 if stopped else 0


def _check(args: argparse.Namespace) -> None:
    """Every number that must be one, before anything starts."""
    check_json(args.json)
    for name in ("rounds", "requests", "tokens", "prefill", "decode", "inflight", "pieces"):
        if getattr(args, name, 1) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    for name in ("streams", "concurrency", "workers"):
        for text in getattr(args, name, "1").split(","):
            if not (text.isdecimal() and int(text)):
                raise ConfigError(f"--{name} takes numbers above 0, not {text!r}")
    for name in ("step_ms", "gap_ms"):
        if getattr(args, name, 1.0) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")

"""`baton bench engine`: the torch engine's steps beside `transformers`, in one process and one run.

The two sides take turns, with the same weights, prompts and threads, so that whatever else the
machine does meets both: the ratio is what counts. Both must say the same tokens.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from protocol.errors import ConfigError

if TYPE_CHECKING:
    from baton.bench.engine_sides import Ours, Theirs

_MODELS: Final = ("tiny", "100m")
_CHUNK: Final = 512
"""Tokens of a step as workers have it when they are not told another number."""
_DECODE_STEPS: Final = 16
_SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table."""

    what: str
    """`decode`: one step of `batch` sequences; `prefill`: `batch` whole prompts side by side."""
    batch: int
    length: int
    """Tokens of context or prompt."""
    piece: int
    """Prefill: tokens at a time."""


CELLS: Final = (
    *(Cell("decode", batch, length, _CHUNK) for batch in (1, 16) for length in (64, 512)),
    Cell("prefill", 1, 64, 64),
    Cell("prefill", 16, 64, 64),
    Cell("prefill", 1, 512, 512),
    Cell("prefill", 1, 2048, _CHUNK),
    Cell("prefill", 1, 2048, 2048),
)


_LONGEST: Final = max(cell.length for cell in CELLS)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a cell: medians, in milliseconds for a step or a batch of prompts."""

    model: str
    what: str
    batch: int
    length: int
    piece: int
    ours_ms: float
    theirs_ms: float
    ratio: float
    """Median of the rounds' ratios of wall time, ours to theirs: below 1 we are faster."""
    ours_cpu_ms: float
    theirs_cpu_ms: float
    cpu_ratio: float
    cache: str
    """Of `transformers`: the faster one here."""
    rounds: int
    same_tokens: bool


@dataclass(frozen=True, slots=True)
class _Time:
    wall_s: float
    cpu_s: float


class _Stopped(Exception):
    """Control-C between two measurements."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(_MODELS), help="of tiny, 100m")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both sides")
    parser.add_argument("--longest", type=int, default=_LONGEST, help="context or prompt, tokens")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", metavar="F", default="", help="write the rows there as well")


async def run_engine(args: argparse.Namespace, stop: asyncio.Event) -> int:
    """Print a table; 1 if the two sides say different tokens. Raises ConfigError."""
    models = [name for name in args.models.split(",") if name]
    unknown = sorted(set(models) - set(_MODELS))
    if unknown or not models:
        raise ConfigError(f"--models takes {' and '.join(_MODELS)}, not {args.models!r}")
    if args.rounds < 1 or args.threads < 0:
        raise ConfigError("--rounds must be at least 1, and --threads not negative")
    if not any(cell.length <= args.longest for cell in CELLS):
        raise ConfigError("--longest leaves nothing to measure")
    rows: list[Row] = []
    # In a thread: control-C reaches the loop, and the measuring looks at `stop` between two turns.
    await asyncio.to_thread(_measure, args, models, stop, rows)
    _print(rows, args)
    if args.json:
        _write_json(Path(args.json), rows)
    return 0 if all(row.same_tokens for row in rows) else 1


def _measure(
    args: argparse.Namespace, models: list[str], stop: asyncio.Event, rows: list[Row]
) -> None:
    try:
        from baton.bench.engine_sides import Ours, Theirs, set_threads
    except ImportError as error:
        raise ConfigError(f"`baton bench engine` needs torch: {error}") from None
    set_threads(args.threads)
    cells = [cell for cell in CELLS if cell.length <= args.longest]
    room = max(cell.batch * (cell.length + 2 * _DECODE_STEPS) for cell in cells)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if stop.is_set():
            raise _Stopped

    try:
        for model in models:
            say(f"{model}: making the weights")
            theirs = Theirs(model, args.dtype)
            with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
                ours = Ours(Path(folder), theirs.model, dtype=args.dtype, num_tokens=room)
            try:
                for cell in cells:
                    rows.append(  # noqa: PERF401  what is measured stays if we are stopped
                        _of_cell(model, cell, ours, theirs, args.rounds, say)
                    )
            finally:
                ours.close()
    except _Stopped:
        pass


def _of_cell(
    model: str, cell: Cell, ours: "Ours", theirs: "Theirs", rounds: int, say: Callable[[str], None]
) -> Row:
    pieces = f", {cell.piece} at a time" if cell.what == "prefill" else ""
    name = f"{model}: {cell.what} of {cell.batch} x {cell.length} tokens{pieces}"
    say(name)
    prompts = _prompts(cell)
    _choose_cache(cell, theirs, prompts)
    turn_ours, turn_theirs = _turn(cell, ours, prompts), _turn(cell, theirs, prompts)
    same = turn_ours() == turn_theirs()  # and both are warm
    times: list[tuple[_Time, _Time]] = []
    for number in range(rounds):
        say(f"{name}: round {number + 1} of {rounds}")
        if number % 2:
            second = _timed(turn_theirs)
            times.append((_timed(turn_ours), second))
        else:
            times.append((_timed(turn_ours), _timed(turn_theirs)))
    return _row(model, cell, times, theirs.cache, same_tokens=same)


def _prompts(cell: Cell) -> list[list[int]]:
    rng = random.Random(_SEED)
    # Ids that every vocabulary here has.
    return [[rng.randrange(3, 3000) for _ in range(cell.length)] for _ in range(cell.batch)]


def _choose_cache(cell: Cell, theirs: "Theirs", prompts: list[list[int]]) -> None:
    """The one with which `transformers` is faster here, by the better of two warm turns."""
    best: dict[float, str] = {}
    for cache in theirs.caches:
        theirs.cache = cache
        turn = _turn(cell, theirs, prompts)
        turn()
        best[min(_timed(turn).wall_s for _ in range(2))] = cache
    theirs.cache = best[min(best)]


def _turn(cell: Cell, side: "Ours | Theirs", prompts: list[list[int]]) -> Callable[[], object]:
    if cell.what == "prefill":
        return lambda: side.prefill(prompts, cell.piece)
    # A batch is filled in small pieces: the scores of all its prompts at once would be large.
    side.prefill(prompts, max(cell.length // 4, 1), room=_DECODE_STEPS)
    return lambda: side.decode(_DECODE_STEPS)


def _timed(turn: Callable[[], object]) -> _Time:
    wall, cpu = time.perf_counter(), time.process_time()
    turn()
    return _Time(time.perf_counter() - wall, time.process_time() - cpu)


def _row(
    model: str, cell: Cell, times: list[tuple[_Time, _Time]], cache: str, *, same_tokens: bool
) -> Row:
    median = statistics.median
    units_per_ms = 1e3 / (_DECODE_STEPS if cell.what == "decode" else 1)
    return Row(
        model, cell.what, cell.batch, cell.length, cell.piece,
        ours_ms=median(ours.wall_s for ours, _ in times) * units_per_ms,
        theirs_ms=median(theirs.wall_s for _, theirs in times) * units_per_ms,
        ratio=median(ours.wall_s / theirs.wall_s for ours, theirs in times),
        ours_cpu_ms=median(ours.cpu_s for ours, _ in times) * units_per_ms,
        theirs_cpu_ms=median(theirs.cpu_s for _, theirs in times) * units_per_ms,
        cpu_ratio=median(ours.cpu_s / theirs.cpu_s for ours, theirs in times),
        cache=cache,
        rounds=len(times),
        same_tokens=same_tokens,
    )  # fmt: skip


def _write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def _print(rows: list[Row], args: argparse.Namespace) -> None:
    if not rows:
        return
    print(
        f"\n{args.dtype}; ms for one decode step or a batch of prompts, "
        f"median of {args.rounds} rounds; ratio: ours to transformers'\n"
        f"{'model':6} {'what':8} {'batch':>5} {'tokens':>6} {'piece':>5} {'ours':>9} {'theirs':>9} "
        f"{'ratio':>6} {'ours CPU':>9} {'theirs':>9} {'ratio':>6}  {'cache':8}tokens"
    )
    for row in rows:
        piece = row.piece if row.what == "prefill" else "-"
        print(
            f"{row.model:6} {row.what:8} {row.batch:5} {row.length:6} {piece:>5} "
            f"{row.ours_ms:9.2f} {row.theirs_ms:9.2f} {row.ratio:6.2f} "
            f"{row.ours_cpu_ms:9.2f} {row.theirs_cpu_ms:9.2f} {row.cpu_ratio:6.2f}  "
            f"{row.cache:8}{'same' if row.same_tokens else 'DIFFER'}"
        )

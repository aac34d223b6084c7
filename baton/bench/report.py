"""Rows of figures: medians over the rounds, as a table for people and as JSON for programs."""

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError


@dataclass(slots=True)
class Row:
    """One case; a figure for each round that was measured."""

    case: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        values = self.figures.get(name)
        return statistics.median(values) if values else None


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Markdown; `columns`: figure -> heading. The range follows where rounds differ by a tenth."""
    lines = [
        "",
        title,
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(row.figures.get(name, [])) for name in columns]
        lines.append(f"| {row.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, low, high = statistics.median(values), min(values), max(values)
    if high - low <= 0.1 * abs(middle):
        return _short(middle)
    return f"{_short(middle)} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )


def check_json(path: str) -> None:
    """Raises ConfigError before anything is measured."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: no such folder")


def document(what: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Every round's figures, and where they were taken."""
    return {
        "what": what,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        },
        "rows": [{"case": row.case, "figures": row.figures} for row in rows],
    }


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def percentile(values: Sequence[float], fraction: float) -> float:
    """Raises ValueError if there are none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))]


async def until_stopped(measure: Awaitable[None], stop: asyncio.Event) -> bool:
    """Whether it was stopped. What was measured stays."""
    measuring = asyncio.ensure_future(measure)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([measuring, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in (measuring, stopping):
        task.cancel()
    await asyncio.wait([measuring, stopping])
    if measuring.cancelled():
        return True
    measuring.result()
    return stop.is_set()

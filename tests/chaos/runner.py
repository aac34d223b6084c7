"""Runs rows one after the other and prints the table.

One fleet serves row after row as long as it is mended after each; a row that breaks servers has its
own, and so has the row after one that left something behind.
"""

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from tests.chaos.rows import Row
from tests.chaos.trial import Trial, Void, mend
from tests.chaos.world import ChaosFleet

ROWS_PER_FLEET: Final = 20
"""Logs and address space are finite: a new fleet now and then."""
HEAD: Final = (
    "verdict",
    "transport",
    "row",
    "req",
    "err",
    "bad",
    "hit",
    "gap/bound s",
    "left",
    "s",
)


class Runner:
    """All rows of one transport. `keep`: where folders of fleets go, which then stay."""

    def __init__(self, transport: str, out: TextIO, keep: Path | None = None) -> None:
        self.transport = transport
        self.done: list[dict[str, Any]] = []
        self._out = out
        self._keep = keep
        self._fleet: ChaosFleet | None = None
        self._served = 0
        self._folders: list[Path] = []

    def run(self, rows: Sequence[Row]) -> None:
        """Everything that was started is gone afterwards, also after Ctrl-C."""
        try:
            for number, row in enumerate(rows, 1):
                self._say(f"[{number}/{len(rows)}] {self.transport} {row.name} ...")
                found = self._row(row)
                self.done.append(found)
                self._say(line_of(found))
                for text in [*found["problems"], *found["evidence"]]:
                    self._say(f"      {text}")
        finally:
            self._stop()

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _row(self, row: Row) -> dict[str, Any]:
        began = time.monotonic()
        found: dict[str, Any] = {
            "row": row.name, "transport": self.transport, "requests": 0, "expected_errors": 0,
            "unexpected_errors": 0, "hit": 0, "gap_s": 0.0, "bound_s": 0.0, "left": [], "gone": [],
            "problems": [], "evidence": [],
        }  # fmt: skip
        try:
            with self._on_fleet(row) as fleet:
                self._on(fleet, row, found)
        except Exception as error:  # noqa: BLE001  the next row has a fleet of its own
            found["problems"].append(f"the row broke: {error!r}")
            found["evidence"].append(traceback.format_exc(limit=-4))
            self._stop()
        if found["problems"] and "verdict" not in found:
            found["verdict"] = "FAIL"
        found.setdefault("verdict", "ok")
        found["seconds"] = round(time.monotonic() - began, 1)
        return found

    def _on(self, fleet: ChaosFleet, row: Row, found: dict[str, Any]) -> None:
        trial = Trial(fleet, f"{row.name} {len(self.done)}")
        try:
            row.run(trial)
        except Void as void:
            trial.join()
            found.update(verdict="void", problems=[str(void)])
            self._stop()
            return
        except BaseException:
            self._say(fleet.dump_logs()[-3000:])
            raise
        found.update(trial.numbers())
        if found["problems"] and self._keep is not None:
            (fleet.folder / f"{row.name.replace('/', '_')}.txt").write_text(fleet.dump_logs())

    @contextmanager
    def _on_fleet(self, row: Row) -> Iterator[ChaosFleet]:
        if row.fresh or row.settings or row.sizes != (2, 2):
            fleet = self._start(row.sizes, row.settings)
            try:
                yield fleet
            finally:
                fleet.stop()
            return
        if self._fleet is None or self._served >= ROWS_PER_FLEET:
            self._stop()
            self._fleet, self._served = self._start((2, 2), ()), 0
        fleet = self._fleet
        yield fleet
        self._served += 1
        if self._fleet is not None:
            mend(fleet)

    def _start(self, sizes: tuple[int, int], settings: tuple[str, ...]) -> ChaosFleet:
        base = str(self._keep) if self._keep is not None else None
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=base))
        self._folders.append(folder)
        fleet = ChaosFleet(
            folder, self.transport, prefill=sizes[0], decode=sizes[1], settings=settings
        )
        try:
            fleet.start()
            fleet.learn_ports()
        except BaseException:
            fleet.stop()
            raise
        return fleet

    def _stop(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.stop()
        if self._keep is None:
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
            self._folders.clear()


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["verdict"],
        found["transport"],
        found["row"],
        str(found["requests"]),
        str(found["expected_errors"]),
        str(found["unexpected_errors"]),
        str(found["hit"]),
        f"{found['gap_s']:.1f}/{found['bound_s']:.1f}",
        str(len(found["left"]) + len(found["gone"])),
        f"{found.get('seconds', 0.0):.0f}",
    )


WIDTHS: Final = (7, 9, 42, 4, 4, 4, 4, 11, 4, 4)


def line_of(found: dict[str, Any] | None) -> str:
    texts = HEAD if found is None else cells(found)
    return "  ".join(
        text.ljust(width) if at < 3 else text.rjust(width)
        for at, (text, width) in enumerate(zip(texts, WIDTHS, strict=True))
    ).rstrip()


def table(done: Sequence[dict[str, Any]]) -> str:
    """All rows, then the sums."""
    counts = {v: sum(f["verdict"] == v for f in done) for v in ("ok", "FAIL", "void")}
    sums = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    requests = sum(found["requests"] for found in done)
    seconds = sum(found["seconds"] for found in done)
    tail = f"{len(done)} rows: {sums}; {requests} requests, {seconds:.0f} s"
    return "\n".join([line_of(None), *(line_of(found) for found in done), tail])


def write_json(path: Path, done: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"rows": list(done)}, indent=1) + "\n")

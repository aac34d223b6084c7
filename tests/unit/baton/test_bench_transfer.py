"""`baton bench transfer`: real processes measure, what cannot run is a row with its reason, and
Ctrl-C leaves no process and still prints what there is."""

import argparse
import asyncio
import json
import os
from pathlib import Path

import pytest

from baton.bench import transfer
from baton.bench.command import add_arguments, run_bench
from baton.bench.transfer import PATHS, PULLS, Measured, Row, run_transfers, table
from baton.bench.transfer_peer import BLOCK_BYTES, check, fill
from protocol.errors import ConfigError
from worker.kv.arena import Arena


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PULLS", dict.fromkeys(PULLS, 1))
    monkeypatch.setattr(transfer, "_IDLE_S", 0.05)


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["transfer", *flags])


async def test_floors_and_transports_are_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    args = parsed("--paths=socket,shm", "--repeats=1", f"--json={file}")
    assert await run_bench(args, asyncio.Event()) == 0
    said = capsys.readouterr()
    rows = {row["path"]: row for row in json.loads(file.read_text())["paths"]}
    assert set(rows) == {"socket", "shm"}
    for name, row in rows.items():
        assert row["failed"] == ""
        assert [len(row["seconds"][shape]) for shape in PULLS] == [1, 1, 1]
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)
        assert (row["idle_percent"] is None) is (name == "socket")
        assert f"| {name} | " in said.out
        assert f"round 1 of 1: {name}" in said.err


async def test_what_cannot_run_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PATHS, "ucx", Measured("no-such", {}, ""))
    args = parsed("--paths=ucx,memcpy", "--repeats=2")
    assert await run_transfers(args, asyncio.Event()) == 0
    said = capsys.readouterr()
    line = "| ucx | - | - | - | - | - | transfer: no-such does not work here: not in this version |"
    assert line in said.out
    assert said.err.count(": ucx") == 1, "what failed is not tried again"
    assert "| memcpy | - " not in said.out


async def test_stopped_early_it_prints_what_it_has_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = asyncio.Event()
    pids = []

    async def stop_at_once(process: asyncio.subprocess.Process, *_: object) -> object:
        pids.append(process.pid)
        stop.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(transfer, "_ask", stop_at_once)
    assert await run_transfers(parsed("--paths=shm"), stop) == 130
    assert "| shm | - | - | - | - | - | not measured |" in capsys.readouterr().out
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--paths=shm,smh",), "--paths: smh; known: memcpy, socket"),
        (("--paths=,",), "--paths: none; known"),
        (("--repeats=0",), "--repeats must be at least 1"),
        (("--paths=memcpy", "--repeats=1", "--json=/nowhere/x"), "cannot write /nowhere/x"),
    ],
)
async def test_wrong_options_are_one_line(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        await run_transfers(parsed(*flags), asyncio.Event())


def test_the_table_shows_median_and_best() -> None:
    seconds = {"contiguous": [0.0671, 0.0336, 0.1], "scattered": [0.0168], "one": [2e-6, 4e-6]}
    row = Row("shm", "", seconds, {"contiguous": 0.192, "scattered": 0.1, "one": 2e-5}, 0.25)
    line = "| shm | 1.00 / 2.00 | 2.00 / 2.00 | 3.0 / 2.0 | 1000 / 10 | 0.2 |  |"
    assert line in table([row])


def test_wrong_bytes_are_not_a_measurement() -> None:
    arena = Arena(4, BLOCK_BYTES)
    try:
        fill(arena)
        check(arena, [2, 3], [2, 3])
        with pytest.raises(RuntimeError, match="block 1 does not hold what was sent"):
            check(arena, [2, 3], [2, 1])
    finally:
        arena.close()

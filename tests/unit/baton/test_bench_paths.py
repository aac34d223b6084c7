"""`baton bench paths`, and that the router's own code costs per token and per request no more than
it did: ratios to a floor in the same run, never times."""

import argparse
import asyncio
import json
import math
from pathlib import Path

import pytest
import uvloop

from baton.bench import paths
from baton.bench.command import add_arguments, run_bench
from protocol.errors import LocalError
from router import streams
from router.sinks import CollectSink

TOKEN, REQUEST = paths.PATHS
CEILINGS = {TOKEN: 27.0, REQUEST: 10.5}
"""1.6 times the median of many runs. Who makes a path dearer on purpose measures it again; who
makes it cheaper lowers its ceiling."""
PIECES = {TOKEN: 20, REQUEST: 15}
TRIES = 3
"""Noise mostly adds, so the best counts; a path that costs twice as much fails them all."""


def measured(case: str) -> dict[str, float]:
    """On the loop that routers run on, and not in its debug mode."""
    with asyncio.Runner(debug=False, loop_factory=uvloop.new_event_loop) as runner:
        return paths.figures(runner.run(paths.PATHS[case](PIECES[case])))


@pytest.mark.parametrize("case", paths.PATHS)
def test_the_router_costs_no_more_than_it_did(case: str) -> None:
    ceiling, tries = CEILINGS[case], []
    while len(tries) < TRIES and min(tries, default=math.inf) > ceiling:
        found = measured(case)
        tries.append(found["ratio"])
    if min(tries) > ceiling:
        shown = ", ".join(f"{ratio:.1f}" for ratio in tries)
        pytest.fail(
            f"{case} costs {shown} times its floor, at most {ceiling:g} is expected; now"
            f" {found['router_us']:.2f} us, floor {found['floor_us']:.2f} us (`baton bench paths`)"
        )


async def test_both_paths_are_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = tmp_path / "rows.json"
    args = parser.parse_args(["paths", "--rounds=2", "--pieces=2", f"--json={file}"])
    assert await run_bench(args, asyncio.Event()) == 0
    said = capsys.readouterr()
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == [TOKEN, REQUEST]
    for row in rows:
        assert set(row["figures"]) == set(paths.COLUMNS)
        assert all(len(values) == 2 for values in row["figures"].values())
        assert f"| {row['case']} | " in said.out
        assert f"round 2 of 2: {row['case']}" in said.err


async def test_tokens_that_arrive_nowhere_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams._Splice, "write", lambda _self, _middle: None)
    with pytest.raises(ExceptionGroup) as caught:
        await paths.token_pieces(1)
    assert caught.group_contains(LocalError, match="no token went to its stream")


async def test_an_answer_that_is_not_whole_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"usage":{"completion_tokens":1}}'
    monkeypatch.setattr(CollectSink, "body", lambda _self: body)
    with pytest.raises(ExceptionGroup) as caught:
        await paths.request_pieces(1)
    assert caught.group_contains(LocalError, match="two tokens")


def test_figures_are_the_medians_of_the_pieces() -> None:
    pieces = [paths.Piece(10.0, 1.0), paths.Piece(30.0, 2.0), paths.Piece(20.0, 4.0)]
    assert paths.figures(pieces) == {
        "router_us": 20.0, "floor_us": 2.0, "over_us": 16.0, "ratio": 10.0,
    }  # fmt: skip

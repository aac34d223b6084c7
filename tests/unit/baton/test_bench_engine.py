"""`baton bench engine`: the form of what it prints, what it refuses, and its end by control-C.

Nothing about times: those are for people to read.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from baton.bench import engine_sides
from baton.main import main

SHORT = ["bench", "engine", "--models=tiny", "--rounds=1", "--longest=64", "--threads=1"]


def test_table_has_a_line_for_each_cell_and_both_sides_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    assert main([*SHORT, f"--json={file}"]) == 0
    said = capsys.readouterr()
    title, head, *lines = said.out.strip().splitlines()
    assert title.startswith("float32")
    assert head.split()[:4] == ["model", "what", "batch", "tokens"]
    assert [tuple(line.split()[:5]) for line in lines] == [
        ("tiny", "decode", "1", "64", "-"),
        ("tiny", "decode", "16", "64", "-"),
        ("tiny", "prefill", "1", "64", "64"),
        ("tiny", "prefill", "16", "64", "64"),
    ]
    assert [line.split()[-1] for line in lines] == ["same"] * len(lines)
    rows = json.loads(file.read_text())
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert row["cache"] == line.split()[-2]
        assert row["cache"] in engine_sides.Theirs.caches
        for name in ("ours_ms", "theirs_ms", "ratio", "ours_cpu_ms", "theirs_cpu_ms", "cpu_ratio"):
            assert row[name] > 0
    assert said.err.count("round 1 of 1") == len(lines)


def test_sides_that_disagree_are_shown_and_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = msgspec.structs.replace(engine_sides._GREEDY, temperature=2.0)
    monkeypatch.setattr(engine_sides, "_GREEDY", hot)
    assert main(SHORT) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--models=huge", "baton: --models takes tiny and 100m, not 'huge'"),
        ("--models=", "baton: --models takes tiny and 100m, not ''"),
        ("--rounds=0", "baton: --rounds must be at least 1, and --threads not negative"),
        ("--threads=-1", "baton: --rounds must be at least 1, and --threads not negative"),
        ("--longest=63", "baton: --longest leaves nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    flag: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, flag]) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize("missing", ["transformers", "torch"])
def test_missing_library_is_named_in_one_line(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "baton.bench.engine_sides")
    assert main(SHORT) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("baton: `baton bench engine` ")
    assert missing in last


def test_control_c_ends_it_between_two_turns_and_keeps_what_is_measured() -> None:
    command = [sys.executable, "-m", "baton", *SHORT, "--rounds=1000000"]
    bench = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert bench.stderr is not None
        for line in bench.stderr:
            if "round 2 of" in line:
                break
        bench.send_signal(signal.SIGINT)
        out, err = bench.communicate(timeout=30)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 0
    assert out == ""
    assert "Traceback" not in err

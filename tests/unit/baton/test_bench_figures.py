"""`baton bench tokens | requests | latency | scheduler`: what they print and write, what they
refuse, and what Ctrl-C leaves. Nothing about times: those are for people to read."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from baton.bench import canned, prompts
from baton.bench.bare_router import bare_router
from baton.bench.canned_bus import bus_floor, bus_way
from baton.bench.client import Client, chat, closed_loop
from baton.bench.command import add_arguments, run_bench
from baton.bench.report import Row, percentile, table
from baton.demo import demo_model_folder
from baton.main import main
from protocol.errors import ConfigError
from tests.contract.nats_server import NatsServer
from text.assets import load_assets
from text.template import ChatTemplate
from text.tokenizer import Tokenizer

TOKENS = ["tokens", "--streams=3,5", "--tokens=4", "--step-ms=5", "--rounds=2"]


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


async def test_a_fleet_is_measured_beside_its_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    args = parsed(*TOKENS, "--processes=2", f"--json={file}")
    assert await run_bench(args, asyncio.Event()) == 0
    said = capsys.readouterr()
    assert "mock servers" not in said.out
    document = json.loads(file.read_text())
    assert document["what"] == "tokens"
    assert document["machine"]["cores"] == os.cpu_count()
    assert [row["case"] for row in document["rows"]] == [
        "3 streams",
        "5 streams",
    ]
    for row in document["rows"]:
        figures = row["figures"]
        assert {len(values) for values in figures.values()} == {2}
        for name in (
            "router",
            "floor",
            "bus_floor",
            "nats_floor",
            "nats",
            "prefill",
            "decode",
            "rss_mb",
        ):
            assert min(figures[name]) > 0, name
        assert f"| {row['case']} | " in said.out
        for at in range(2):
            parts = [figures[role][at] for role in ("router", "nats", "prefill", "decode")]
            assert figures["total"][at] == pytest.approx(sum(parts))
        assert f"round 2 of 2: {row['case']}" in said.err


def test_prompts_have_the_lengths_that_their_names_say() -> None:
    tokenizer = Tokenizer.from_assets(load_assets(demo_model_folder()))
    found = {
        name: len(tokenizer.encode(text, add_special_tokens=False))
        for name, text in prompts.texts().items()
    }
    assert found["short"] < 100
    assert 1_950 < found["2k"] < 2_050
    assert 7_950 < found["8k"] < 8_050
    assert len(prompts.texts()["32kb"]) == pytest.approx(32_768, rel=0.01)


async def test_the_scheduler_alone_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--workers=2", "--inflight=3", "--requests=20", "--rounds=1")
    assert await run_bench(parsed("scheduler", *flags), asyncio.Event()) == 0
    assert "| 2 workers, 3 requests at once | " in capsys.readouterr().out


async def test_the_floor_streams_and_answers_whole() -> None:
    async with canned.floor(5.0) as (port, process):
        streamed = await closed_loop(port, [chat("x", 5, stream=True)] * 6, 3)
        assert max(len(answer.arrivals) for answer in streamed) > 1
        [whole] = await closed_loop(port, [chat("x", 5, stream=False)], 1)
        assert json.loads(whole.body)["choices"]
        assert process.cpu_ns() > 0
    with pytest.raises(OSError, match=r"Connect call failed|refused"):
        await Client.connect(port)


async def said_to(port: int, request: bytes) -> bytes:
    """The whole stream that is the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.readuntil(b"\r\n0\r\n\r\n")
    finally:
        writer.close()


async def test_the_floors_off_nats_say_as_much_as_the_other(tmp_path: Path) -> None:
    request = chat("x", 5, stream=True)
    nats = NatsServer(tmp_path)
    nats.start()
    try:
        async with canned.floor(5.0) as (port, _):
            wanted = await said_to(port, request)
        async with bus_floor(nats.port, 5.0, groups=2, frame_bytes=64) as (port, process):
            assert [await said_to(port, request) for _ in range(2)] == [wanted] * 2
            assert process.cpu_ns() > 0
        async with bus_way(nats.port) as port:
            assert [await said_to(port, request) for _ in range(2)] == [wanted] * 2
            nats.freeze()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await said_to(port, request)
    finally:
        nats.kill()


async def test_the_bare_router_reads_as_ours_does_and_runs_both_legs_over_nats(
    tmp_path: Path,
) -> None:
    assets = load_assets(demo_model_folder())
    prompt = ChatTemplate.from_assets(assets).render(
        [{"role": "user", "content": "hello"}], now=datetime.now(UTC)
    )
    num_tokens = len(Tokenizer.from_assets(assets).encode(prompt, add_special_tokens=False))
    nats = NatsServer(tmp_path)
    nats.start()
    try:
        async with bare_router(nats.port) as (port, process):
            answers = await closed_loop(port, [chat("hello", 2, stream=False)] * 40, 8)
            assert len(answers) == 40
            for answer in answers:
                said = json.loads(answer.body)
                assert said["choices"][0]["message"]["content"] == " word word"
                assert said["usage"]["prompt_tokens"] == num_tokens
            assert b" word word" in await said_to(port, chat("hello", 2, stream=True))
            assert process.cpu_ns() > 0
            nats.freeze()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await said_to(port, chat("hello", 2, stream=True))
    finally:
        nats.kill()


async def test_an_answer_that_is_none_is_no_figure() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        client = await Client.connect(server.sockets[0].getsockname()[1])
        with pytest.raises(ConfigError, match="not a 200"):
            await client.ask(chat("x", 1, stream=True))
        client.close()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["tokens", "--rounds=0"], "--rounds must be at least 1"),
        (["tokens", "--streams=64,x"], "--streams takes numbers above 0, not 'x'"),
        (["tokens", "--step-ms=0"], "--step-ms must be above 0"),
        (["requests", "--prompts=long"], "--prompts takes short, 2k, 32kb, 8k, not 'long'"),
        (["requests", "--concurrency=0"], "--concurrency takes numbers above 0, not '0'"),
        (["latency", "--json=/nowhere/x"], "cannot write /nowhere/x: no such folder"),
        (["paths", "--pieces=0"], "--pieces must be at least 1"),
        (["scheduler", "--workers="], "--workers takes numbers above 0, not ''"),
    ],
)
def test_wrong_options_are_one_line(
    flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr() == ("", f"baton: {line}\n")


def test_control_c_prints_what_there_is_and_leaves_no_process() -> None:
    flags = ["latency", "--requests=3", "--gap-ms=1", "--rounds=1000000"]
    command = [sys.executable, "-m", "baton", "bench", *flags]
    bench = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert bench.stderr is not None
        for line in bench.stderr:
            if "round 3 of" in line:
                break
        children = _tree(bench.pid)
        bench.send_signal(signal.SIGINT)
        out, err = bench.communicate(timeout=30)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 130
    assert "| a question each 1 ms | " in out
    assert "Traceback" not in err
    assert len(children) > 5
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        path = Path(f"/proc/{pid}/task/{pid}/children")
        found.extend(int(child) for child in path.read_text().split())
    return found[1:]


def test_the_table_shows_medians_and_the_range_where_rounds_differ() -> None:
    row = Row("a case")
    for value in (10.0, 12.0, 14.0):
        row.add(one=value, two=100.0)
    text = table("A title", [row], {"one": "first", "two": "second", "three": "third"})
    assert "| | first | second | third |" in text
    assert "| a case | 12.0 (10.0-14.0) | 100 | - |" in text
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0

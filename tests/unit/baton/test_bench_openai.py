"""`baton bench tokens | requests | latency --engine openai`: the mock servers, and a fleet in front
of them. Nothing about times: those are for people to read."""

import argparse
import asyncio
import json
from pathlib import Path

import pytest

from baton.bench.client import chat, closed_loop
from baton.bench.command import add_arguments, run_bench
from baton.bench.fleet import Shape, running, serving
from baton.bench.mock_openai import TOKENS
from baton.demo import demo_model_folder
from text.assets import load_assets
from text.tokenizer import Tokenizer


def ids(num_tokens: int) -> list[int]:
    """Of a right answer."""
    return [TOKENS[left % len(TOKENS)] for left in reversed(range(num_tokens))]


async def ask(port: int, request: bytes, end: bytes) -> bytes:
    """What comes until `end`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    said = await reader.readuntil(end)
    writer.close()
    return said


def events(said: bytes) -> list[dict[str, object]]:
    """Of a stream."""
    return [json.loads(line[6:]) for line in said.split(b"\n") if line.startswith(b"data: {")]


def completion(**more: object) -> bytes:
    body = json.dumps({"prompt": [1, 2, 3], **more}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def running_streams(port: int) -> str:
    page = await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n", b'num_gpu_blocks="1000000"} 1')
    return page.partition(b"num_requests_running ")[2].split()[0].decode()


@pytest.mark.parametrize("step_ms", [0.0, 2.0])
async def test_a_mock_server_says_every_token_in_an_event_of_its_own(step_ms: float) -> None:
    async with serving("mock_openai", step_ms) as (port, _):
        for count in (1, 2, 25):
            said = await ask(port, completion(stream=True, max_tokens=count), b"\r\n0\r\n\r\n")
            choices = [event["choices"][0] for event in events(said)]  # type: ignore[index]
            assert [choice["token_ids"] for choice in choices] == [[token] for token in ids(count)]
            ends = [choice["finish_reason"] for choice in choices]
            assert ends == [*[None] * (count - 1), "length"]
            assert b"data: [DONE]\n\n" in said
        assert await ask(port, b"GET /health HTTP/1.1\r\n\r\n", b"{}")
        assert b"404" in await ask(port, b"GET /v2 HTTP/1.1\r\n\r\n", b"\r\n\r\n")


async def test_a_mock_server_forgets_a_stream_whose_reader_went() -> None:
    async with serving("mock_openai", 20.0) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(completion(stream=True, max_tokens=1_000_000))
        await reader.readuntil(b"token_ids")
        assert await running_streams(port) == "1"
        writer.close()
        while await running_streams(port) != "0":
            pass  # the test's timeout is the bound


async def test_a_fleet_in_front_of_mock_servers_gives_their_answers() -> None:
    tokenizer = Tokenizer.from_assets(load_assets(demo_model_folder()))
    async with running(Shape(engine="openai", step_ms=2.0, decode=2)) as fleet:
        for count in (1, 2, 25):
            right = tokenizer.decode(ids(count))
            whole = await closed_loop(fleet.port, [chat("x", count, stream=False)] * 6, 3)
            answers = [json.loads(answer.body) for answer in whole]
            texts = {answer["choices"][0]["message"]["content"] for answer in answers}
            assert texts == {right}
            assert {answer["usage"]["completion_tokens"] for answer in answers} == {count}
            said = await ask(fleet.port, chat("x", count, stream=True), b"data: [DONE]\n\n")
            deltas = [event["choices"][0]["delta"] for event in events(said)]  # type: ignore[index]
            assert "".join(delta.get("content", "") for delta in deltas) == right


async def test_each_process_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--prompts=short", "--concurrency=3", "--requests=20", "--rounds=1"]
    args = parser.parse_args(["requests", "--engine=openai", *flags, f"--json={file}"])
    assert await run_bench(args, asyncio.Event()) == 0
    [row] = json.loads(file.read_text())["rows"]
    parts = [row["figures"][role] for role in ("router", "nats", "prefill", "decode", "mock")]
    assert min(min(values) for values in parts) > 0
    assert row["figures"]["total"] == [pytest.approx(sum(values[0] for values in parts))]
    assert "| mock servers | total |" in capsys.readouterr().out

"""A prefill and a decode vLLM behind Baton: real KV over NIXL, real faults.

The tests of this file share the servers and run in order: the last ones end them.
"""

import asyncio
import http.client
import itertools
import json
import pydoc_data.topics
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
import nats
import pytest

from baton.demo import demo_model_folder
from protocol.blocks import pack_ids
from protocol.codec import decode_out, encode
from protocol.handoff import KvHandle
from protocol.jobs import Decode, JobEnvelope, Prefill, Tokens
from protocol.out import Failed, Out, Prefilled
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from tests.e2e.fleet import Fleet
from tests.vllm.reference import MARGIN, Case, Reference
from tests.vllm.servers import VllmServer
from text.assets import load_assets
from text.template import ChatTemplate
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(420)

NUM_PROMPTS = 50
MAX_TOKENS = 12
CONCURRENCY = 6


CHAT = [{"role": "user", "content": "What does the with statement do in a program?"}]


@dataclass
class Pair:
    """Two servers, a router, and a Baton worker beside each."""

    fleet: Fleet
    prefill: VllmServer
    decode: VllmServer
    tokenizer: Tokenizer
    corpus: list[int]
    cases: list[Case]
    """For the comparison with transformers; the others are for one test each."""
    chat: Case
    short: Case
    forged: Case
    innocent: Case
    frozen: Case
    orphan: Case

    def any(self, seed: int, length: int) -> list[int]:
        """Some prompt, whatever follows it."""
        start = random.Random(seed).randrange(len(self.corpus) - length)
        return self.corpus[start : start + length]

    def ask(self, body: dict[str, Any], endpoint: str = "completions") -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.fleet.port, timeout=90)
        try:
            headers = {"content-type": "application/json"}
            body = {"model": "demo", "temperature": 0, "ignore_eos": True, **body}
            connection.request("POST", f"/v1/{endpoint}", json.dumps(body), headers)
            response = connection.getresponse()
            return {"status": response.status, **json.loads(response.read())}
        finally:
            connection.close()

    def num_pulls(self) -> float:
        return self.decode.metric("vllm:nixl_xfer_time_seconds_count")


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """All that is computed by transformers, before two servers take the cores."""
    assets = load_assets(demo_model_folder())
    tokenizer = Tokenizer.from_assets(assets)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    corpus = tokenizer.encode(text[:300_000], add_special_tokens=False)
    reference = Reference()
    rng = random.Random(8)
    lengths = [8, 31, 32, 33, 64, 65, 700]
    lengths += [int(8 * 30 ** rng.random()) for _ in range(NUM_PROMPTS - len(lengths))]
    ends = set(tokenizer.eos_ids)
    cases = reference.draw(corpus, [*lengths, 80, 96, 96, 200, 200], MAX_TOKENS)
    chat = ChatTemplate.from_assets(assets).render(
        CHAT, now=datetime.now(UTC), add_generation_prompt=True
    )
    ids = tokenizer.encode(chat, add_special_tokens=False)
    out, margin = reference.greedy(ids, MAX_TOKENS)
    assert margin >= MARGIN, "another question is needed"
    out = out[: next((i for i, token in enumerate(out) if token in ends), len(out))]
    names = ("short", "forged", "innocent", "frozen", "orphan")
    return {
        "tokenizer": tokenizer,
        "corpus": corpus,
        "cases": cases[:NUM_PROMPTS],
        "chat": Case(ids, out),
        **dict(zip(names, cases[NUM_PROMPTS:], strict=True)),
    }


@pytest.fixture(scope="module")
def pair(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("vllm")
    servers = [VllmServer("prefill", folder), VllmServer("decode", folder)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.until_ready()
            server.warm_up()
        settings = ["both.served_model_name=idle"]
        with Fleet(folder / "fleet", prefill=0, decode=0, both=1, settings=settings) as fleet:
            for server, name in zip(servers, ("vp", "vd"), strict=True):
                fleet.add_worker(name, server.role, *server.flags)
            yield Pair(fleet, *servers, **prepared)
    finally:
        for server in servers:
            server.stop()


async def test_fifty_prompts_are_transformers_and_every_block_came_over(pair: Pair) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)
    url = f"{pair.fleet.base_url}/v1"
    before = pair.num_pulls()

    async with aiohttp.ClientSession() as session:

        async def ask(number: int, ids: list[int]) -> str:
            stream = number % 2 == 1
            body = {"model": "demo", "temperature": 0, "max_tokens": MAX_TOKENS}
            body |= {"prompt": ids, "stream": stream, "ignore_eos": True}
            async with gate, session.post(f"{url}/completions", json=body) as got:
                assert got.status == 200, await got.text()
                if not stream:
                    return str((await got.json())["choices"][0]["text"])
                lines = (await got.text()).split("\n\n")
                assert lines[-2] == "data: [DONE]"
                chunks = [json.loads(line[6:]) for line in lines[:-2]]
                return "".join(c["text"] for chunk in chunks for c in chunk["choices"])

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(i, case.ids)) for i, case in enumerate(pair.cases)]
    wrong = [
        (len(case.ids), task.result(), expected)
        for task, case in zip(asked, pair.cases, strict=True)
        if task.result() != (expected := pair.tokenizer.decode(case.out))
    ]
    assert not wrong
    # a few may have been short enough, or known enough, to be prefilled where they are decoded
    assert pair.num_pulls() - before >= NUM_PROMPTS * 0.8
    assert pair.decode.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_chat_with_logprobs_is_transformers(pair: Pair) -> None:
    body = {"messages": CHAT, "max_tokens": MAX_TOKENS, "logprobs": True, "top_logprobs": 2}
    body["ignore_eos"] = False
    answer = pair.ask(body, "chat/completions")
    assert answer["status"] == 200, answer
    [choice] = answer["choices"]
    assert choice["message"]["content"] == pair.tokenizer.decode(pair.chat.out)
    entries = choice["logprobs"]["content"]
    assert all(-20 < entry["logprob"] <= 0 for entry in entries)
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_one_token_and_a_stop_string(pair: Pair) -> None:
    ids, out = pair.short.ids, pair.short.out
    answer = pair.ask({"prompt": ids, "max_tokens": 1})
    assert answer["choices"][0]["text"] == pair.tokenizer.decode(out[:1])
    text = pair.tokenizer.decode(out)
    stop = text[len(text) // 2 :][:3]
    answer = pair.ask({"prompt": ids, "max_tokens": MAX_TOKENS, "stop": [stop]})
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_echo_with_logprobs(pair: Pair) -> None:
    ids = pair.any(2, 20)
    answer = pair.ask({"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1})
    said = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert said[0] is None
    assert len(said) == 21
    assert all(value <= 0 for value in said[1:])


def test_what_is_cached_is_known_and_not_fetched_again(pair: Pair) -> None:
    ids = pair.any(3, 161)
    assert pair.ask({"prompt": ids, "max_tokens": 2})["status"] == 200

    def is_local() -> bool:
        before = pair.num_pulls()
        assert pair.ask({"prompt": ids, "max_tokens": 2})["status"] == 200
        return pair.num_pulls() == before

    # the events arrive a moment later
    pair.fleet.until(is_local, what="the decode side's cache to be known", timeout_s=20.0)


def test_a_client_that_goes_is_noticed_by_vllm(pair: Pair) -> None:
    ids = pair.any(4, 100)
    connection = http.client.HTTPConnection("127.0.0.1", pair.fleet.port, timeout=60)
    body = {"model": "demo", "prompt": ids, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    assert pair.decode.metric("vllm:num_requests_running") == 1
    aborted = pair.decode.metric("vllm:request_success_total", finished_reason="abort")
    response.close()
    connection.close()
    pair.fleet.until(
        lambda: pair.decode.metric("vllm:num_requests_running") == 0, what="vLLM to stop"
    )
    after = pair.decode.metric("vllm:request_success_total", finished_reason="abort")
    assert after == aborted + 1


async def test_a_forged_handle_never_reaches_vllm(pair: Pair) -> None:
    ids, other = pair.forged.ids, pair.innocent.ids
    subjects = Subjects("default")
    sampling = Sampling(MAX_TOKENS, temperature=0.0)
    heard: asyncio.Queue[Out] = asyncio.Queue()
    client = await nats.connect(pair.fleet.nats_url)
    try:

        async def on_message(message: Any) -> None:
            for said in decode_out(message.data).outs:
                heard.put_nowait(said)

        for name in ("vp", "vd"):
            await client.subscribe(subjects.out("forger", name), cb=on_message)
        await client.flush()

        async def send(name: str, job: Prefill | Decode) -> Out:
            incarnation = pair.fleet.worker(name)["incarnation"]
            envelope = encode(JobEnvelope("forger", [job]))
            await client.publish(subjects.jobs(name, incarnation), envelope)
            while True:
                said = await asyncio.wait_for(heard.get(), 30)
                if isinstance(said, Prefilled | Failed):
                    return said

        prefilled = await send("vp", Prefill(1, "f/0", Tokens(pack_ids(ids)), sampling))
        assert isinstance(prefilled, Prefilled)
        assert prefilled.first is None
        handle = prefilled.handle
        assert isinstance(handle, KvHandle)
        pulls = pair.num_pulls()
        failed = await send("vd", Decode(2, "f/0", Tokens(pack_ids(other)), sampling, handle))
        assert isinstance(failed, Failed)
        assert failed.code == "handle_mismatch"
        assert pair.num_pulls() == pulls
    finally:
        await client.close()
    for case in (pair.innocent, pair.forged):
        body = {"prompt": case.ids, "max_tokens": MAX_TOKENS}
        answer = await asyncio.to_thread(pair.ask, body)
        assert answer["choices"][0]["text"] == pair.tokenizer.decode(case.out)


def test_an_orphaned_handle_is_forgotten_by_both(pair: Pair) -> None:
    """What the forger left: vLLM frees it by its own clock, and so do our books."""
    pair.fleet.until(
        lambda: pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") >= 1,
        what="vLLM's lease to run out",
        timeout_s=45.0,
    )
    pair.fleet.until_idle(timeout_s=10.0)


def test_a_frozen_prefill_side_costs_time_and_nothing_else(pair: Pair) -> None:
    ids, out = pair.frozen.ids, pair.frozen.out
    pair.prefill.signal(signal.SIGSTOP)
    try:
        answer = pair.ask({"prompt": ids, "max_tokens": MAX_TOKENS})
        assert answer["status"] == 200, answer
        assert answer["choices"][0]["text"] == pair.tokenizer.decode(out)
    finally:
        pair.prefill.signal(signal.SIGCONT)
    before = pair.num_pulls()
    seeds = itertools.count(60)

    def comes_over() -> bool:
        prompt = pair.any(next(seeds), 70)
        assert pair.ask({"prompt": prompt, "max_tokens": 1})["status"] == 200
        return pair.num_pulls() > before

    pair.fleet.until(comes_over, what="the prefill side to be used again", timeout_s=60.0)


def test_a_dead_prefill_side_ends_its_worker_and_nothing_else(pair: Pair) -> None:
    ids, out = pair.orphan.ids, pair.orphan.out
    pair.prefill.signal(signal.SIGKILL)
    answer = pair.ask({"prompt": ids, "max_tokens": MAX_TOKENS})
    assert answer["status"] == 200, answer
    assert answer["choices"][0]["text"] == pair.tokenizer.decode(out)
    assert pair.fleet.until_ended("vp") == 70


def test_a_dead_decode_side_is_an_error_and_no_hang(pair: Pair) -> None:
    ids = pair.any(9, 100)
    answers: list[Any] = []
    first = threading.Event()

    def read() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", pair.fleet.port, timeout=90)
        body = {
            "model": "demo", "prompt": ids, "max_tokens": 3000, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
        )
        for line in connection.getresponse():
            answers.append(line)
            first.set()
        connection.close()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert first.wait(60)
    pair.decode.signal(signal.SIGKILL)
    assert pair.fleet.until_ended("vd") == 70
    reader.join(90)
    assert not reader.is_alive()
    lines = [line.strip() for line in answers if line.strip()]
    assert lines[-1] == b"data: [DONE]"
    assert "error" in json.loads(lines[-2][6:])
    assert pair.ask({"prompt": ids, "max_tokens": 1})["status"] == 503

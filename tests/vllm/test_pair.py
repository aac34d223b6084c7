"""A prefill and a decode vLLM behind Baton: real KV over NIXL, real faults.

The tests of this file share the servers and run in order: the last ones end them.
"""

import asyncio
import http.client
import itertools
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import aiohttp
import pytest

from protocol.blocks import pack_ids
from protocol.handoff import KvHandle
from protocol.jobs import Cancel, Decode, Prefill, Tokens
from protocol.out import Failed, Prefilled
from protocol.sampling import Sampling
from tests.vllm.bus_client import bus_client
from tests.vllm.pair import CHAT, MAX_TOKENS, NUM_PROMPTS, Pair, running_pair

pytestmark = pytest.mark.timeout(600)

CONCURRENCY = 6
_SEEDS = itertools.count(60)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("vllm")) as pair:
        yield pair


def lent_by(outcome: object) -> KvHandle:
    """The handle of a prefill leg; no first token comes with it."""
    assert isinstance(outcome, Prefilled), outcome
    assert outcome.first is None
    assert outcome.handle is not None
    return outcome.handle


async def test_fifty_prompts_are_transformers_and_vllm_counts_their_transfers(pair: Pair) -> None:
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
                events = (await got.text()).split("\n\n")
                *lines, last = [event for event in events if event.startswith("data: ")]
                assert last == "data: [DONE]"
                chunks = [json.loads(line[6:]) for line in lines]
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


def test_a_stream_comes_in_pieces(pair: Pair) -> None:
    case = pair.short
    texts = []
    connection = http.client.HTTPConnection("127.0.0.1", pair.fleet.port, timeout=90)
    with closing(connection):
        body = {"model": "demo", "prompt": case.ids, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "max_tokens": MAX_TOKENS}
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                texts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    assert "".join(texts) == pair.tokenizer.decode(case.out)
    assert len(texts) > MAX_TOKENS // 2


def test_an_answer_obeys_a_schema(pair: Pair) -> None:
    schema = {
        "type": "object",
        "properties": {"number": {"enum": [1, 2]}},
        "required": ["number"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"messages": CHAT, "max_tokens": 60, "ignore_eos": False, "response_format": wanted}
    answer = pair.ask(body, "chat/completions")
    assert answer["status"] == 200, answer
    [choice] = answer["choices"]
    assert json.loads(choice["message"]["content"])["number"] in (1, 2)


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
    pair.fleet.until(
        lambda: pair.decode.metric("vllm:num_requests_running") == 1, what="vLLM's own count"
    )
    said = pair.decode.metric("vllm:generation_tokens_total")
    ended = pair.decode.metric("vllm:request_success_total")
    response.close()
    connection.close()
    pair.fleet.until(
        lambda: pair.decode.metric("vllm:num_requests_running") == 0, what="vLLM to stop"
    )
    # vLLM 0.32 does not count what was aborted: it neither ended nor came to its last token
    assert pair.decode.metric("vllm:request_success_total") == ended
    assert pair.decode.metric("vllm:generation_tokens_total") - said < 2900


async def test_a_handle_is_never_sent_with_another_prompt(pair: Pair) -> None:
    ids, other = pair.forged.ids, pair.innocent.ids
    sampling = Sampling(MAX_TOKENS, temperature=0.0)
    async with bus_client(pair.fleet, "vp", "vd") as client:
        await client.send("vp", Prefill(1, "f/0", Tokens(pack_ids(ids)), sampling))
        handle = lent_by(await client.outcome(1, timeout_s=30.0))
        pulls = pair.num_pulls()
        await client.send("vd", Decode(2, "f/0", Tokens(pack_ids(other)), sampling, handle))
        failed = await client.outcome(2, timeout_s=30.0)
        assert isinstance(failed, Failed)
        assert failed.code == "handle_mismatch"
        assert pair.num_pulls() == pulls
    for case in (pair.innocent, pair.forged):
        body = {"prompt": case.ids, "max_tokens": MAX_TOKENS}
        answer = await asyncio.to_thread(pair.ask, body)
        assert answer["choices"][0]["text"] == pair.tokenizer.decode(case.out)


async def test_an_orphaned_handle_is_forgotten_by_both(pair: Pair) -> None:
    """Nobody fetches its blocks: vLLM frees them by its own clock, and so do our books."""

    def num_expired() -> float:
        return pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total")

    before = num_expired()
    async with bus_client(pair.fleet, "vp") as client:
        ids = Tokens(pack_ids(pair.any(5, 70)))
        await client.send("vp", Prefill(21, "o/0", ids, Sampling(1, temperature=0.0)))
        lent_by(await client.outcome(21, timeout_s=30.0))

    def wait() -> None:
        pair.fleet.until(
            lambda: num_expired() > before, what="vLLM's lease to run out", timeout_s=60.0
        )
        pair.fleet.until_idle(timeout_s=40.0)

    await asyncio.to_thread(wait)


async def test_a_prefill_side_frozen_with_lent_blocks_gives_no_wrong_token(pair: Pair) -> None:
    """Between the legs, so that the pull is from a frozen process: it may come (the kernel reads
    a stopped process' memory) or fail or hang until we cancel, but what comes is right."""
    ids, out = pair.pulled.ids, pair.pulled.out
    sampling = Sampling(MAX_TOKENS, temperature=0.0, ignore_eos=True)
    async with bus_client(pair.fleet, "vp", "vd") as client:
        await client.send("vp", Prefill(11, "g/0", Tokens(pack_ids(ids)), sampling))
        handle = lent_by(await client.outcome(11, timeout_s=30.0))
        pair.prefill.signal(signal.SIGSTOP)
        try:
            job = Decode(12, "g/0", Tokens(pack_ids(ids)), sampling, handle)
            await client.send("vd", job)
            outcome = await client.outcome(12, timeout_s=10.0)
            if outcome is None:
                await client.send("vd", Cancel(12))
            print("pull from a frozen process:", outcome, client.ids.get(12))
            heard = client.ids.get(12, [])
            assert heard == out[: len(heard)]
            assert outcome != "length" or len(heard) == MAX_TOKENS
            # others are served meanwhile
            case = pair.cases[0]
            body = {"prompt": case.ids, "max_tokens": MAX_TOKENS}
            answer = await asyncio.to_thread(pair.ask, body)
            assert answer["status"] == 200, answer
            assert answer["choices"][0]["text"] == pair.tokenizer.decode(case.out)
        finally:
            pair.prefill.signal(signal.SIGCONT)
    answer = await asyncio.to_thread(pair.ask, {"prompt": ids, "max_tokens": MAX_TOKENS})
    assert answer["choices"][0]["text"] == pair.tokenizer.decode(out)
    await asyncio.to_thread(until_pulled, pair)


def test_a_frozen_prefill_side_costs_time_and_nothing_else(pair: Pair) -> None:
    ids, out = pair.frozen.ids, pair.frozen.out
    pair.prefill.signal(signal.SIGSTOP)
    try:
        answer = pair.ask({"prompt": ids, "max_tokens": MAX_TOKENS})
        assert answer["status"] == 200, answer
        assert answer["choices"][0]["text"] == pair.tokenizer.decode(out)
    finally:
        pair.prefill.signal(signal.SIGCONT)
    until_pulled(pair)


def until_pulled(pair: Pair) -> None:
    """A thawed prefill side is used again."""
    before = pair.num_pulls()

    def comes_over() -> bool:
        prompt = pair.any(next(_SEEDS), 70)
        answer = pair.ask({"prompt": prompt, "max_tokens": 1})
        assert answer["status"] == 200, answer
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

"""The API on the bus, asked with plain nats-py: no code of ours on the client's side."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from tests.e2e.fleet import MODEL, Fleet

pytestmark = pytest.mark.xdist_group("api")

CHAT = "baton.default.api.chat.completions"
TEXT = "baton.default.api.completions"
MODELS = "baton.default.api.models"
NUM_LONG = 24


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[Client]:
    client = await nats.connect(fleet.nats_url)
    yield client
    await client.close()
    fleet.until_idle()


@dataclass
class Answer:
    """Everything up to the message with the status."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    status: str = ""
    headers: dict[str, str] = field(default_factory=dict)


async def send(
    client: Client, subject: str, body: bytes | dict[str, Any], headers: dict[str, str] | None
) -> Subscription:
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    await client.publish(subject, payload, reply=inbox, headers=headers)
    return subscription


async def ask(
    client: Client,
    subject: str,
    body: bytes | dict[str, Any],
    headers: dict[str, str] | None = None,
) -> Answer:
    subscription = await send(client, subject, body, headers)
    answer = Answer()
    async with asyncio.timeout(10):
        while not answer.status:
            message: Msg = await subscription.next_msg(timeout=10)
            if message.headers and "Baton-Status" in message.headers:
                assert message.data == b""
                answer.status = message.headers["Baton-Status"]
                answer.headers = dict(message.headers)
            else:
                answer.chunks.append(json.loads(message.data))
    await subscription.unsubscribe()
    return answer


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 1, **fields}


async def test_models(client: Client) -> None:
    answer = await ask(client, MODELS, b"")
    assert answer.status == "200"
    assert MODEL in [model["id"] for model in answer.chunks[0]["data"]]


async def test_a_chat_in_one_piece_and_in_chunks(client: Client) -> None:
    whole = await ask(client, CHAT, chat(max_tokens=6), {"x-request-id": "bus-1"})
    assert whole.status == "200"
    assert whole.headers["x-request-id"] == "bus-1"
    [body] = whole.chunks
    assert body["id"] == "chatcmpl-bus-1"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await ask(client, CHAT, chat(max_tokens=6, **options))
    assert stream.status == "200"
    *chunks, usage = stream.chunks
    assert (usage["choices"], usage["usage"]) == ([], body["usage"])
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == [None, "length"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == body["choices"][0]["message"]["content"]


async def test_log_probabilities_and_the_prompt_come_here_too(client: Client) -> None:
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 5, "seed": 1, "echo": True, "logprobs": 2}
    whole = await ask(client, TEXT, body)
    assert whole.status == "200"
    [choice] = whole.chunks[0]["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3 + 5
    stream = await ask(client, TEXT, {**body, "stream": True})
    chunks = [chunk["choices"][0] for chunk in stream.chunks]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    tokens = [token for chunk in chunks for token in chunk["logprobs"]["tokens"]]
    assert tokens == choice["logprobs"]["tokens"]


async def test_an_answer_larger_than_a_message_comes_in_parts(client: Client) -> None:
    """As docs/api.md tells a client that is not ours."""
    more = {"n": 8, "ignore_eos": True, "logprobs": 20, "max_tokens": 300}
    subscription = await send(client, TEXT, {"model": MODEL, "prompt": "ab", **more}, None)
    data = b""
    part, count = -1, 0
    while part + 1 != count or not count:
        message = await subscription.next_msg(timeout=10)
        part, count = (int(number) for number in (message.headers or {})["Baton-Part"].split()[1:])
        data += message.data
    last = await subscription.next_msg(timeout=10)
    assert (last.headers or {})["Baton-Status"] == "200"
    assert len(data) > client.max_payload
    assert count > 1
    body = json.loads(data)
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [300] * 8
    await subscription.unsubscribe()


async def test_a_streamed_completion(client: Client) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 5, "stream": True}
    answer = await ask(client, TEXT, body)
    assert answer.status == "200"
    texts = ["", ""]
    for chunk in answer.chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert [len(text) for text in texts] == [5, 5]


@pytest.mark.parametrize(
    ("subject", "body", "status", "code"),
    [
        (CHAT, b"{", "400", "invalid_json"),
        (CHAT, {"model": MODEL, "messages": []}, "400", "invalid_messages"),
        (CHAT, chat(tools=[{}]), "400", "unsupported_parameter"),
        (CHAT, chat(model="nobody"), "404", "model_not_found"),
        (TEXT, {"model": MODEL, "prompt": "x", "max_tokens": 0, "stream": True}, "400",
         "invalid_value"),
        ("baton.default.api.embeddings", b"{}", "404", "not_found"),
        ("baton.default.api.chat", b"{}", "404", "not_found"),
    ],
)  # fmt: skip
async def test_errors_are_an_object_and_a_status(
    client: Client, subject: str, body: bytes | dict[str, Any], status: str, code: str
) -> None:
    answer = await ask(client, subject, body)
    assert answer.status == status
    [chunk] = answer.chunks
    assert set(chunk["error"]) == {"message", "type", "param", "code"}
    assert chunk["error"]["code"] == code
    assert answer.headers["x-request-id"] in chunk["error"]["message"]


async def test_a_client_that_stops_listening_is_cancelled(client: Client, fleet: Fleet) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 20_000, "stream": True, "n": 2}
    subscription = await send(client, TEXT, body, None)
    await subscription.next_msg(timeout=5)
    assert fleet.cluster_info()["inflight"] == 2
    await subscription.unsubscribe()
    await client.flush()
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=1.0)
    fleet.until_idle()


async def test_a_client_that_disconnects_is_cancelled(client: Client, fleet: Fleet) -> None:
    other = await nats.connect(fleet.nats_url)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 20_000, "stream": True}
    subscription = await send(other, TEXT, body, None)
    await subscription.next_msg(timeout=5)
    await other.close()
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=1.0)


async def test_two_routers_share_the_requests(client: Client, fleet: Fleet) -> None:
    """And when one leaves while it serves, what it serves is finished."""
    beats: list[tuple[str, bool, bool]] = []

    async def on_beat(message: Msg) -> None:
        beats.append(msgspec.msgpack.decode(message.data, type=tuple[str, bool, bool]))

    await client.subscribe("baton.default.routers", cb=on_beat)
    second = await asyncio.to_thread(fleet.add_router, "second")
    asked = [name.partition("-")[0] for name, _, joining in beats if joining]
    assert asked == ["second"]  # once, for a report of every worker

    def served() -> tuple[float, float]:
        name = "baton_choices_total"
        return fleet.metric(name), fleet.metric(name, second.port)

    def has_work() -> bool:
        return fleet.cluster_info(second.port)["inflight"] > 0

    try:
        before = served()
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        answers = await asyncio.gather(*(ask(client, TEXT, body) for _ in range(40)))
        assert {answer.status for answer in answers} == {"200"}
        shares = [after - then for after, then in zip(served(), before, strict=True)]
        assert sum(shares) == 40
        assert min(shares) >= 5

        long = {"model": MODEL, "prompt": "x", "max_tokens": 150, "stream": True}
        # of fewer none may come to the second
        running = [asyncio.create_task(ask(client, TEXT, long)) for _ in range(NUM_LONG)]
        await asyncio.to_thread(fleet.until, has_work, what="work for the second")
    finally:
        code = await asyncio.to_thread(fleet.stop_extra, "second")
    assert code == 0
    answers = await asyncio.gather(*running)
    assert {answer.status for answer in answers} == {"200"}
    assert [len(answer.chunks) for answer in answers] == [150] * NUM_LONG


async def until_answered(subscription: Subscription, *, timeout_s: float) -> Answer:
    """Up to the status, over whatever happens to NATS meanwhile."""
    answer = Answer()
    async with asyncio.timeout(timeout_s):
        async for message in subscription.messages:
            if message.headers and "Baton-Status" in message.headers:
                answer.headers = dict(message.headers)
                answer.status = answer.headers["Baton-Status"]
                return answer
            answer.chunks.append(json.loads(message.data))
    raise AssertionError("the subscription has ended")


@pytest.mark.timeout(120)
async def test_a_restart_of_nats_ends_streams_and_loses_no_whole_answer(tmp_path: Path) -> None:
    """The client comes back seconds after the router; nothing tells it that it has missed
    anything but the end that it gets."""
    with Fleet(tmp_path, settings=("worker.sim_step_ms=20",)) as fleet:
        client = await nats.connect(fleet.nats_url, max_reconnect_attempts=-1)
        try:
            body = {"model": MODEL, "prompt": "x", "ignore_eos": True, "seed": 1}
            stream = await send(client, TEXT, {**body, "max_tokens": 1000, "stream": True}, None)
            # The one is over before the client is back, the other one after.
            wholes = [
                await send(client, TEXT, {**body, "max_tokens": most}, None) for most in (50, 400)
            ]
            for _ in range(10):
                await stream.next_msg(timeout=5)
            await asyncio.to_thread(fleet.kill, "nats")
            await asyncio.to_thread(fleet.restart, "nats")
            began = time.monotonic()
            broken = await until_answered(stream, timeout_s=10)
            assert broken.status == "503"
            assert broken.headers["Retry-After"] == "1"
            assert broken.chunks[-1]["error"]["code"] == "interrupted"
            for subscription, most in zip(wholes, (50, 400), strict=True):
                left_s = 25 - (time.monotonic() - began)
                answer = await until_answered(subscription, timeout_s=left_s)
                assert answer.status == "200"
                assert answer.chunks[-1]["usage"]["completion_tokens"] == most
            await asyncio.to_thread(fleet.until_idle)
        finally:
            await client.close()

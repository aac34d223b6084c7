"""What every bus must do, on a real nats-server and in memory: one suite for both.

Faults are in `test_bus_faults.py`.
"""

import asyncio
from collections import defaultdict

import pytest

from protocol import codec
from protocol.blocks import pack_ids, unpack_ids
from protocol.bus import Callback, Message
from protocol.errors import BusTimeout, LocalError, NoResponders
from protocol.jobs import JobEnvelope, Prefill, Tokens
from protocol.sampling import Sampling
from tests.contract.bus_worlds import PATIENCE_S, Listener, World, started

MIB = 1 << 20


async def test_messages_of_one_subject_arrive_in_order(world: World) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    await receiver.subscribe("o.*", heard)
    for number in range(3000):
        sender.publish(f"o.{number % 3}", str(number).encode())
    await heard.have(3000)
    by_subject = defaultdict(list)
    for message in heard.messages:
        by_subject[message.subject].append(int(message.payload))
    assert by_subject == {f"o.{rest}": list(range(rest, 3000, 3)) for rest in range(3)}


async def test_wildcards_match_whole_tokens(world: World) -> None:
    bus = await started(world)
    star, tail, exact = Listener(), Listener(), Listener()
    await bus.subscribe("a.*.c", star)
    await bus.subscribe("a.>", tail)
    await bus.subscribe("a.b.c", exact)
    for subject in ("a", "a.b", "a.b.c", "a.x.c", "a.b.c.d", "b.b.c"):
        bus.publish(subject, subject.encode())
    await tail.have(4)
    await bus.flush(timeout_s=5)
    assert star.payloads == [b"a.b.c", b"a.x.c"]
    assert tail.payloads == [b"a.b", b"a.b.c", b"a.x.c", b"a.b.c.d"]
    assert exact.payloads == [b"a.b.c"]


async def test_a_queue_group_shares_and_others_get_all(world: World) -> None:
    members, everyone = [Listener() for _ in range(3)], Listener()
    total = Listener()

    def both(member: Listener) -> Callback:
        def call(message: Message) -> None:
            member(message)
            total(message)

        return call

    for member in members:
        await (await started(world)).subscribe("q", both(member), queue="routers")
    sender = await started(world)
    await sender.subscribe("q", everyone)
    for number in range(300):
        sender.publish("q", str(number).encode())
    await everyone.have(300)
    await total.have(300)
    assert sorted(map(int, total.payloads)) == list(range(300))
    assert all(member.messages for member in members)


async def test_a_member_that_drains_loses_nothing(world: World) -> None:
    """Under load, with members that come and go: every message is heard once."""
    sender, total = await started(world), Listener()
    bus = await started(world)
    staying = await bus.subscribe("q", total, queue="routers")
    sent = 0
    for _ in range(20):
        leaving = await (await started(world)).subscribe("q", total, queue="routers")
        for number in range(sent, sent := sent + 200):
            sender.publish("q", str(number).encode())
        await asyncio.sleep(0)
        await leaving.drain(timeout_s=5)
    await total.have(sent)
    assert sorted(map(int, total.payloads)) == list(range(sent))
    await staying.drain(timeout_s=5)
    await staying.close()
    sender.publish("q", b"late")
    await sender.flush(timeout_s=5)
    await bus.flush(timeout_s=5)
    assert len(total.messages) == sent


async def test_a_drain_without_a_server_ends(world: World) -> None:
    bus = await started(world)
    subscription = await bus.subscribe("q", Listener())
    world.kill()
    async with asyncio.timeout(PATIENCE_S):
        await subscription.drain(timeout_s=0.5)


async def test_nobody_listening_is_said_on_the_reply_subject(world: World) -> None:
    bus, gone = await started(world), Listener()
    await bus.subscribe("gone.*", gone)
    bus.publish("nobody", b"job")
    bus.publish("nobody", b"job", reply="gone.w1")
    await gone.have(1)
    await bus.flush(timeout_s=5)
    (message,) = gone.messages
    assert (message.subject, message.payload, message.no_responders) == ("gone.w1", b"", True)


async def test_a_request_to_nobody_fails_at_once(world: World) -> None:
    bus = await started(world)
    before = asyncio.get_running_loop().time()
    with pytest.raises(NoResponders, match="nobody"):
        await bus.request("nobody", b"?", timeout_s=10)
    assert asyncio.get_running_loop().time() - before < 1.0


async def test_requests_get_their_own_replies(world: World) -> None:
    client, server = await started(world), await started(world)
    await server.subscribe("echo", lambda m: server.publish(m.reply, m.payload + b"!"))
    await server.subscribe("mute", lambda m: None)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        asked = [
            group.create_task(client.request("echo", str(i).encode(), timeout_s=10))
            for i in range(100)
        ]
    assert [task.result().payload for task in asked] == [f"{i}!".encode() for i in range(100)]
    with pytest.raises(BusTimeout):
        await client.request("mute", b"?", timeout_s=0.05)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB + 7])
async def test_payloads_of_any_size_pass(world: World, size: int) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    await receiver.subscribe("big", heard)
    payload = (bytes(range(251)) * (size // 251 + 1))[:size]
    sender.publish("big", payload)
    sender.publish("big", payload, headers={"Key": "v"}, reply="answer.to")
    sender.publish("big", b"end")
    await heard.have(3)
    plain, full, end = heard.messages
    assert (plain.payload == payload, plain.headers, plain.reply) == (True, None, "")
    assert (full.payload == payload, full.headers, full.reply) == (True, {"Key": "v"}, "answer.to")
    assert end.payload == b"end"
    assert sender.connected
    assert receiver.lost == 0


async def test_a_prompt_of_a_million_tokens_passes_and_its_answer_too(world: World) -> None:
    client, server = await started(world), await started(world)
    ids = list(range(1_000_000))
    job = JobEnvelope("r1", [Prefill(1, "q/0", Tokens(pack_ids(ids)), Sampling(max_tokens=1))])
    seen: list[JobEnvelope] = []

    def serve(message: Message) -> None:
        seen.append(codec.decode_jobs(message.payload))
        server.publish(message.reply, message.payload[::-1])

    await server.subscribe("jobs", serve)
    reply = await client.request("jobs", codec.encode(job), timeout_s=10)
    assert seen == [job]
    prefill = seen[0].jobs[0]
    assert isinstance(prefill, Prefill)
    assert isinstance(prefill.prompt, Tokens)
    assert list(unpack_ids(prefill.prompt.packed)) == ids
    assert reply.payload[::-1] == codec.encode(job)


async def test_large_payloads_of_two_senders_do_not_mix(world: World) -> None:
    one, two, receiver = await started(world), await started(world), await started(world)
    heard = Listener()
    await receiver.subscribe("big", heard)
    for number in range(5):
        one.publish("big", bytes([1, number]) * MIB)
        two.publish("big", bytes([2, number]) * MIB)
    await heard.have(10)
    assert all(payload == payload[:2] * MIB for payload in heard.payloads)
    heads = [payload[:2] for payload in heard.payloads]
    assert [h[1] for h in heads if h[0] == 1] == [h[1] for h in heads if h[0] == 2] == [*range(5)]


async def test_a_large_request_to_nobody_says_so_once(world: World) -> None:
    bus, gone = await started(world), Listener()
    await bus.subscribe("gone", gone)
    bus.publish("nobody", bytes(3 * MIB), reply="gone")
    await gone.have(1)
    await bus.flush(timeout_s=5)
    assert [message.no_responders for message in gone.messages] == [True]


async def test_a_large_payload_reaches_a_queue_group_of_one(world: World) -> None:
    bus, heard = await started(world), Listener()
    await bus.subscribe("big", heard, queue="g")
    bus.publish("big", bytes(3 * MIB))
    assert await heard.have(1) == [bytes(3 * MIB)]


async def test_a_closed_subscription_is_quiet(world: World) -> None:
    bus, heard, other = await started(world), Listener(), Listener()
    subscription = await bus.subscribe("s", heard)
    await bus.subscribe("s", other)
    bus.publish("s", b"1")
    await other.have(1)
    await heard.have(1)
    await subscription.close()
    bus.publish("s", b"2")
    await other.have(2)
    assert heard.payloads == [b"1"]
    await subscription.close()


async def test_a_subject_that_is_none_is_our_own_mistake(world: World) -> None:
    bus = await started(world)
    for subject in ("", "a b", "a\r\nPUB x"):
        with pytest.raises(LocalError):
            bus.publish(subject, b"")
    with pytest.raises(LocalError):
        await bus.subscribe("a..b", lambda m: None)
    await bus.flush(timeout_s=5)


async def test_close_sends_what_was_published(world: World) -> None:
    sender, receiver, heard = await started(world), await started(world), Listener()
    await receiver.subscribe("s", heard)
    for _ in range(20):
        sender.publish("s", bytes(MIB))
    await sender.close()
    await heard.have(20)

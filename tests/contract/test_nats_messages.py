"""What anybody may publish, and no client library would: it costs the bus nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats.aio.client import Client

from protocol.nats_bus import NatsBus, NatsConfig
from protocol.nats_client import HardyParser
from tests.contract.bus_worlds import PATIENCE_S, Listener, Serve, running
from tests.contract.nats_server import NatsServer


def hpub(block: bytes, place: bytes = b"api.x inbox.x") -> bytes:
    return b"HPUB %b %d %d\r\n%b{}\r\n" % (place, len(block), len(block) + 2, block)


async def say(server: NatsServer, lines: bytes) -> None:
    """What no client library would: the server takes it, and passes it on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    options = b'{"verbose":false,"pedantic":false,"headers":true,"no_responders":true}'
    writer.write(b"CONNECT %b\r\n%bPING\r\n" % (options, lines))
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readline()).startswith(b"INFO")
        assert await reader.readline() == b"PONG\r\n"
    writer.close()


@asynccontextmanager
async def asked(server: NatsServer) -> AsyncIterator[tuple[NatsBus, Listener, Listener]]:
    """A bus with an open door, which is up and hears everything until the end."""
    async with running(NatsConfig(urls=(server.url,))) as (bus, heard):
        door = Listener()
        await bus.subscribe("api.>", door, queue="q")
        yield bus, heard, door
        await bus.flush(timeout_s=PATIENCE_S)
        bus.publish("api.x", b"last")
        await door.until(lambda: door.payloads[-1] == b"last")
        assert heard.kinds == ["up"]
        assert bus.lost == 0
        assert heard.payloads == [b"hello"]


NO_MESSAGES = {
    "subject": b"PUB api.\xff inbox.x 2\r\n{}\r\n",
    "reply": b"PUB api.x inbox.\xff 2\r\n{}\r\n",
    "surrogate": b"PUB api.x inbox.\xed\xa0\x80 2\r\n{}\r\n",
    "subject and headers": hpub(b"NATS/1.0\r\nA: b\r\n\r\n", b"api.\xff inbox.x"),
    "short block": hpub(b"abcd"),
    "empty block": hpub(b"NATS/1.0"),
    "status": hpub(b"NATS/1.0 \xff\xfe\xfd\r\n\r\n"),
    "description": hpub(b"NATS/1.0 404 \xff\r\n\r\n"),
    "description and headers": hpub(b"NATS/1.0 404 \xff\r\nA: b\r\n\r\n"),
}


@pytest.mark.parametrize("lines", NO_MESSAGES.values(), ids=NO_MESSAGES)
async def test_what_is_no_message_is_dropped_and_counted(
    serve: Serve, caplog: pytest.LogCaptureFixture, lines: bytes
) -> None:
    server = serve("")
    good = b"PUB api.x 1\r\n%d\r\n"
    async with asked(server) as (bus, _, door):
        await say(server, good % 1 + lines + good % 2 + 2 * lines + good % 3)
        assert await door.have(3) == [b"1", b"2", b"3"]
        assert bus.num_malformed == 3
    assert caplog.text.count("dropped malformed messages") == 1


MARKS = [b"\x0b", b"\x0c", b"\r", b"\x00", b"\x1c", "\u00a0".encode(), b"\x0c" + b"x" * 4000]


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: repr(mark[:4]))
async def test_a_subject_is_what_the_server_takes_for_one(serve: Serve, mark: bytes) -> None:
    """nats-py divides lines at white space of other kinds, too. What follows a form feed became the
    number of the subscription: 1 answers our requests, 2 is `s`, and 9 and x are none."""
    server = serve("")
    subjects = [b"api.a%b%b" % (mark, end) for end in (b"1", b"2", b"9", b"x", b"")]
    block = b"NATS/1.0\r\nA: b\r\n\r\n"
    lines = [b"PUB %b 1\r\n1\r\n" % subject for subject in subjects]
    lines += [b"PUB %b inbox.x 1\r\n2\r\n" % subject for subject in subjects]
    lines += [hpub(block, subject) for subject in subjects]
    lines += [hpub(block, subject + b" inbox.x") for subject in subjects]
    async with asked(server) as (bus, _, door):
        for line in lines:  # one by one: the server loses CRs where it has to read twice
            await say(server, line)
        await door.have(len(lines))
        assert [message.subject.encode() for message in door.messages] == 4 * subjects
        assert {message.reply for message in door.messages} == {"", "inbox.x"}
        assert [message.headers for message in door.messages[10:]] == 10 * [{"A": "b"}]
        assert bus.num_malformed == 0


async def test_every_reply_can_be_answered_or_is_none(serve: Serve) -> None:
    """The server hangs up when a line is too long, and ours holds more than the reply."""
    server = serve("")
    replies = [b"i\x0cy", b"\x0c", b"i\x0b12", b"i.\x00", b"7", b"*", b"i..j", b"i" * 1024]
    without = [b"i\r", b"i\r7", b"i" * 1025, b"i" * 4080]
    block = b"NATS/1.0\r\nA: b\r\n\r\n"
    lines = [b"PUB api.x %b 2\r\n{}\r\n" % reply for reply in replies + without]
    lines += [hpub(block, b"api.x " + reply) for reply in replies + without]
    async with asked(server) as (bus, _, door):
        for line in lines:  # one by one: the server loses CRs where it has to read twice
            await say(server, line)
        await door.have(len(lines))
        expected = [reply.decode() for reply in replies] + len(without) * [""]
        assert [message.reply for message in door.messages] == 2 * expected
        assert set(door.payloads) == {b"{}"}
        for message in door.messages:
            if message.reply:
                bus.publish(message.reply, b"answer", reply="o" * 255, headers={"A": "b"})
        assert bus.num_malformed == 0


@pytest.mark.parametrize("line", [b"INFO {\r\n", b"-ERR \r\n", b"-ERR '\xff'\r\n"])
async def test_a_server_that_speaks_rubbish_is_not_listened_to(line: bytes) -> None:
    """The line stays where it is: who went on would read it for ever."""
    dropped: list[bytes] = []
    parser = HardyParser(Client(), lambda subject, _: dropped.append(subject))
    with pytest.raises((ValueError, AttributeError)):
        await parser.parse(line)
    assert not dropped

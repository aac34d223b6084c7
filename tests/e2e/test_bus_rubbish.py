"""What anybody may put on the bus: counted, answered where somebody waits, and nothing else."""

import random
import socket

import nats
import pytest

from protocol.codec import encode
from protocol.jobs import Cancel, JobEnvelope
from protocol.subjects import Subjects
from tests.e2e.fleet import MODEL, Fleet

pytestmark = pytest.mark.xdist_group("api")


def _no_messages() -> list[bytes]:
    """What nats-py cannot read, or not as it was meant, and what nobody could answer."""
    lines = [
        b"PUB baton.default.api.%b %b 2\r\n{}\r\n" % place
        for place in (
            (b"\xff", b"inbox.a"),
            (b"completions", b"inbox.\xff"),
            (b"completions", b"inbox.a\x0cb"),
            (b"completions", b"inbox.a\r"),
            (b"models\x0c2", b""),
            (b"models\x0cx", b"inbox.a"),
            (b"models\rx", b"inbox.a"),
        )
    ]
    for block in (b"abcd", b"NATS/1.0", b"NATS/1.0 404 \xff\r\n\r\n", b"NATS/1.0 503\r\n\r\n"):
        size = len(block)
        place = b"baton.default.api.completions inbox.a"
        lines.append(b"HPUB %b %d %d\r\n%b{}\r\n" % (place, size, size + 2, block))
    body = b'{"model": "%b", "prompt": "a", "stream": true}' % MODEL.encode()
    place = b"baton.default.api.completions " + b"i" * 4050  # with our own reply: too long a line
    lines.append(b"PUB %b %d\r\n%b\r\n" % (place, len(body), body))
    return lines


async def test_rubbish_on_the_bus_is_counted_and_harms_nobody(fleet: Fleet) -> None:
    subjects = Subjects("default")
    info = fleet.cluster_info()
    here = fleet.eligible()  # others, of an earlier test, may be on their way out
    workers = [
        (worker["worker_id"], worker["incarnation"])
        for worker in info["workers"]
        if worker["worker_id"] in here
    ]
    router = info["router"]
    places = [subjects.out(router, "x"), subjects.events("decode-0"), subjects.events("nobody")]
    places += [subjects.routers, *(subjects.jobs(*worker) for worker in workers)]
    places += [subjects.gone(router, "decode-9", "x"), subjects.client(router, "7")]
    rng = random.Random(3)
    rubbish = [b"", b"\xc1", b"{}", b"\x93\x01\x02\x03", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000]
    rubbish += [rng.randbytes(rng.randrange(200)) for _ in range(20)]
    before = fleet.metric("baton_events_total", kind="bad_message")
    client = await nats.connect(fleet.nats_url)
    try:
        for place in places:
            for payload in rubbish:
                await client.publish(place, payload)
                await client.publish(place, payload, reply="some.where")
        stray = encode(JobEnvelope("no-such-router", [Cancel(1)]))
        for worker in workers:
            await client.publish(subjects.jobs(*worker), stray)
        for endpoint in ("completions", "models", "no.such.endpoint"):
            subject = subjects.api(endpoint)
            await client.publish(subject, b"{}")  # nobody to answer to
            for payload in rubbish:
                await client.publish(subject, payload, reply=client.new_inbox())
        await client.flush()
    finally:
        await client.close()
    with socket.create_connection(("127.0.0.1", fleet.process("nats").port), timeout=3) as raw_nats:
        raw_nats.recv(65536)  # no client library sends these replies
        raw_nats.sendall(b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n')
        for reply in (b"a.*", b"a.>", b"a..b", b".", b"baton.default.api.models"):
            raw_nats.sendall(b"PUB baton.default.api.models %s 0\r\n\r\n" % reply)
        raw_nats.sendall(b"".join(_no_messages()))
        raw_nats.sendall(b"PING\r\n")
        assert b"PONG" in raw_nats.recv(65536)
    fleet.until(
        lambda: fleet.metric("baton_events_total", kind="bad_message") >= before + 2 * len(rubbish),
        what="the rubbish to be counted",
    )
    assert fleet.metric("baton_events_total", kind="bad_message", cause="malformed") > 0
    subject = subjects.api("models")
    client = await nats.connect(fleet.nats_url)
    try:
        assert MODEL.encode() in (await client.request(subject, timeout=2)).data
    finally:
        await client.close()
    fleet.until_idle()
    assert sorted(fleet.eligible()) == sorted(worker for worker, _ in workers)
    assert fleet.cluster_info()["bus_up"]

"""What only the NATS adapter has: credentials, TLS, and connections that the server closes."""

import asyncio
import datetime
import ipaddress
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from nats.aio.transport import TcpTransport

from protocol.errors import BusError, BusOverflow, ConfigError, LocalError
from protocol.nats_bus import NatsBus, NatsConfig
from protocol.nats_wire import Wire
from tests.contract.bus_worlds import PATIENCE_S, Listener, Serve, running
from tests.contract.nats_server import NatsServer

ALICE = 'authorization { users = [{user: "alice", password: "secret"}] }'
NOBODY = 'authorization { users = [{user: "bob", password: "other"}] }'


class Resetter:
    """A way to a NATS server on which connections are reset: the next `resets` of them after INFO,
    each a turn of the loop later than the one before it, and all on `cut`."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._writers: list[asyncio.StreamWriter] = []
        self.resets = 0
        self.num_reset = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        way = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"nats://127.0.0.1:{way.sockets[0].getsockname()[1]}"
        finally:
            way.close()
            self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            _reset(writer)
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers += (writer, far_writer)
        writer.write(await far_reader.readline())
        if self.resets:
            for _ in range(self.num_reset % 8):
                await asyncio.sleep(0)
            self.resets -= 1
            self.num_reset += 1
            _reset(writer)
            _reset(far_writer)
            return
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(_pump(reader, far_writer))
            pumps.create_task(_pump(far_reader, writer))


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
    except (OSError, RuntimeError):
        pass  # Cut; what RuntimeError means is what these tests are about.
    sink.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    if not writer.is_closing():
        now = struct.pack("ii", 1, 0)  # lingers for no time: RST instead of FIN
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        writer.transport.abort()


def as_in_production(main: Coroutine[Any, Any, None]) -> None:
    """On uvloop. asyncio's transports do not raise where its do."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def refused(config: NatsConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said while the bus tries in vain."""
    bus = NatsBus(config)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        starting = asyncio.ensure_future(bus.start())
        done, _ = await asyncio.wait([starting], timeout=0.7)
        assert not done
        starting.cancel()
        await asyncio.wait([starting])
    await bus.close()
    assert all(record.exc_info is None for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


async def test_user_and_password(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    url = serve(ALICE).url
    async with running(NatsConfig(urls=(url,), user="alice", password="secret")):
        pass
    wrong = NatsConfig(urls=(url,), user="alice", password="hunter2")
    said = await refused(wrong, caplog)
    assert any("refuses our credentials" in line for line in said)
    assert len(said) == len(set(said)) <= 2  # The server may also cut the connection short.
    assert "hunter2" not in "".join(said) + repr(wrong)


async def test_a_password_in_the_url_is_used_and_not_said(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(ALICE)
    config = NatsConfig(urls=(f"nats://alice:secret@127.0.0.1:{server.port}",))
    with caplog.at_level(logging.INFO):
        async with running(config) as (_, heard):
            server.kill()
            await heard.until(lambda: "down" in heard.kinds)
    assert str(server.port) in caplog.text
    assert "secret" not in caplog.text + repr(config)


async def test_a_token(serve: Serve) -> None:
    server = serve('authorization { token: "t0ken" }')
    async with running(NatsConfig(urls=(server.url,), token="t0ken")):
        pass


async def test_revoked_credentials_are_tried_again_until_they_work(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(ALICE)
    config = NatsConfig(urls=(server.url,), user="alice", password="secret", ping_interval_s=0.2)
    async with running(config) as (bus, heard):
        server.reload(NOBODY)
        await heard.until(lambda: "down" in heard.kinds)
        while "refuses our credentials" not in caplog.text:  # noqa: ASYNC110  logs have no event
            await asyncio.sleep(0.02)
        server.reload(ALICE)
        await heard.until(lambda: heard.kinds == ["up", "down", "up"])
        bus.publish("s", b"again")
        await heard.until(lambda: b"again" in heard.payloads)
        await bus.flush(timeout_s=5)


async def test_a_connection_closed_for_good_is_replaced(serve: Serve) -> None:
    """A server whose payload limit was lowered refuses what it took before, and hangs up."""
    server = serve("")
    config = NatsConfig(urls=(server.url,), ping_interval_s=0.2)
    async with running(config) as (bus, heard):
        server.reload("max_payload: 100KB")
        while heard.kinds[-1] != "down":  # The reload has no event that we could wait for.
            bus.publish("s", bytes(500_000))
            try:
                await bus.flush(timeout_s=0.1)
            except BusError:
                pass
        await heard.until(lambda: heard.kinds[-1] == "up")
        bus.publish("s", b"x" * 500_000)
        await heard.until(lambda: heard.payloads[-1] == b"x" * 500_000)
        assert (bus.lost, heard.kinds) == (0, ["up", "down", "up"])


async def test_a_server_that_freezes_again_and_again(serve: Serve) -> None:
    server = serve("")
    config = NatsConfig(
        urls=(server.url,), ping_interval_s=0.1, connect_timeout_s=0.2, reconnect_wait_s=0.05
    )
    async with running(config) as (bus, heard):
        for text in (b"1", b"2"):
            heard.events.clear()
            server.freeze()
            await heard.until(lambda: heard.kinds == ["down"])
            await asyncio.sleep(0.7)  # Some attempts to connect to the frozen server fail.
            server.thaw()
            await heard.until(lambda: heard.kinds == ["down", "up"])
            bus.publish("s", text)
            await bus.flush(timeout_s=5)
            assert heard.payloads[-1] == text


async def test_nothing_waits_for_pongs_that_come_late(serve: Serve) -> None:
    """A flush that timed out must not harm the connection when the server answers after all."""
    server = serve("")
    async with running(NatsConfig(urls=(server.url,))) as (bus, heard):
        server.freeze()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await bus.flush(timeout_s=5)
        server.thaw()
        await bus.flush(timeout_s=5)
        bus.publish("s", b"alive")
        await heard.have(2)
        assert heard.kinds == ["up"]


def test_whatever_is_written_to_a_reset_wire_is_an_os_error() -> None:
    """Of the kinds that nats-py looks for: its pings ask for RuntimeError, all else for OSError."""

    async def main() -> None:
        wire = Wire(tls_only=False)
        # Closed whatever happens: uvloop's loop would not end, and a failure look like a hang.
        async with await asyncio.start_server(lambda _, writer: _reset(writer), "127.0.0.1") as way:
            await wire.connect(urlsplit(f"//127.0.0.1:{way.sockets[0].getsockname()[1]}"), 1024, 5)
            with pytest.raises(OSError):
                await wire.readline()
            for use in (wire.write, lambda data: wire.writelines([data])):
                with pytest.raises(ConnectionResetError) as caught:
                    use(b"PING")
                assert isinstance(caught.value, RuntimeError)
            with pytest.raises(ConnectionResetError):
                await wire.connect_tls("localhost", ssl.create_default_context(), 1024, 1)
            wire.abandon()
            wire.write(b"PING")

    as_in_production(main())


async def test_a_start_goes_on_after_what_nobody_foresaw(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drain = TcpTransport.drain
    surprises = ["hangs", "dies", "dies"]

    async def surprise(self: TcpTransport) -> None:
        match surprises.pop() if surprises else "":
            case "dies":
                raise RuntimeError("out of the blue")
            case "hangs":
                await asyncio.Event().wait()
        await drain(self)

    monkeypatch.setattr(TcpTransport, "drain", surprise)
    config = NatsConfig(urls=(serve("").url,), connect_timeout_s=0.1, reconnect_wait_s=0.01)
    async with running(config) as (_, heard):
        assert heard.kinds == ["up"]
    assert "out of the blue" in caplog.text
    assert "stands still" in caplog.text


@pytest.mark.parametrize("how", ["dies", "dies again and again", "is cancelled", "hangs"])
async def test_a_connection_that_reconnects_no_more_is_replaced(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The task in which nats-py reconnects ends, or stands still; nats-py does not look."""
    server = serve("")
    config = NatsConfig(
        urls=(server.url,), ping_interval_s=0.1, connect_timeout_s=0.1, reconnect_wait_s=0.01
    )
    drain = TcpTransport.drain
    troubles = 0
    troubled: list[asyncio.Task[Any]] = []

    async def trouble(self: TcpTransport) -> None:
        nonlocal troubles
        if not troubles:
            return await drain(self)
        troubles -= 1
        task = asyncio.current_task()
        assert task is not None
        troubled.append(task)
        if how == "is cancelled":
            raise asyncio.CancelledError
        if how != "hangs":
            raise RuntimeError("out of the blue")
        while task.cancelling() < 2:  # The first cancel is lost, as nats-py loses some.
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
        raise asyncio.CancelledError

    monkeypatch.setattr(TcpTransport, "drain", trouble)
    async with running(config) as (bus, heard):
        server.kill()
        await heard.until(lambda: "down" in heard.kinds)
        troubles = 4 if how == "dies again and again" else 1
        server.start()
        await heard.until(lambda: heard.kinds == ["up", "down", "up"])
        bus.publish("s", b"again")
        await bus.flush(timeout_s=5)
        assert (heard.payloads, troubles, bus.lost) == ([b"hello", b"again"], 0, 0)
        assert all(task.done() for task in troubled)
    assert ("stands still" if how == "hangs" else "reconnecting has died") in caplog.text


def certify(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "baton test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_file, key_file


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_resets_right_after_the_greeting(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, tls: bool
) -> None:
    """uvloop raises RuntimeError on a write to what was reset, and nats-py never came back. Where
    TLS was to begin, it waited for ever for the connection to be closed."""
    cert, key = map(str, certify(tmp_path))
    server = serve(f'tls {{ cert_file: "{cert}", key_file: "{key}" }}' if tls else "")

    async def main() -> None:
        way = Resetter(server)
        way.resets = 40
        async with way.listening() as url:
            config = NatsConfig(
                urls=(url.replace("nats", "tls") if tls else url,),
                tls_ca=cert if tls else "",
                ping_interval_s=60.0,  # Too late to help: nats-py itself has to come through.
                connect_timeout_s=0.3,
                reconnect_wait_s=0.01,
            )
            async with running(config) as (bus, heard):
                way.resets = 40
                way.cut()
                await heard.until(lambda: heard.kinds == ["up", "down", "up"])
                bus.publish("s", b"again")
                assert await heard.have(2) == [b"hello", b"again"]
                assert (way.num_reset, bus.lost) == (80, 0)

    as_in_production(main())
    assert tls or "the connection was reset" in caplog.text
    assert "unforeseen" not in caplog.text


@pytest.mark.parametrize("first", [False, True])
async def test_mutual_tls(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    cert, key = map(str, certify(tmp_path))
    tls = f'cert_file: "{cert}", key_file: "{key}", ca_file: "{cert}", verify: true'
    server = serve(f"tls {{ {tls}, handshake_first: {str(first).lower()} }}")
    config = NatsConfig(
        urls=(f"tls://127.0.0.1:{server.port}",),
        tls_ca=cert,
        tls_cert=cert,
        tls_key=key,
        tls_handshake_first=first,
    )
    async with running(config) as (bus, heard):
        bus.publish("s", bytes(5 << 20))
        await heard.have(2)
        server.kill()
        await heard.until(lambda: "down" in heard.kinds)
        server.start()
        await heard.until(lambda: heard.kinds == ["up", "down", "up"])
        bus.publish("s", b"again")
        await heard.have(3)
    stranger = NatsConfig(urls=(server.url,), tls_hostname="127.0.0.1", tls_handshake_first=first)
    (said,) = await refused(stranger, caplog)
    assert "certificate" in said.lower()


async def test_tls_never_falls_back_to_plain_text(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve("")
    config = NatsConfig(urls=(f"tls://127.0.0.1:{server.port}",), password="x", user="y")
    (said,) = await refused(config, caplog)
    assert "offers no TLS" in said


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("scheme", "line"), [("tls", 1), ("nats", 1), ("nats", 2)])
async def test_a_cancel_in_the_turn_in_which_the_server_speaks_ends_the_start(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, scheme: str, line: int, again: bool
) -> None:
    """What nats-py waits with loses such a cancel; its attempts would go on for ever, or it would
    be connected and nobody's."""
    server = serve("")
    config = NatsConfig(urls=(f"{scheme}://127.0.0.1:{server.port}",), reconnect_wait_s=0.01)
    bus = NatsBus(config)
    starting = asyncio.ensure_future(bus.start())
    readline = TcpTransport.readline
    said: list[bytes] = []

    async def speak(self: TcpTransport) -> bytes:
        said.append(await readline(self))
        if len(said) == line:
            starting.cancel()
            if again:
                asyncio.get_running_loop().call_later(0.05, starting.cancel)
        return said[-1]

    monkeypatch.setattr(TcpTransport, "readline", speak)
    await asyncio.wait([starting], timeout=PATIENCE_S)
    assert starting.cancelled()
    await bus.close()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    _, running = await asyncio.wait(left, timeout=2.0) if left else ((), ())
    assert not running


@pytest.mark.parametrize(
    "config",
    [
        NatsConfig(urls=()),
        NatsConfig(urls=("ws://127.0.0.1:1",)),
        NatsConfig(urls=("nats://:4222",)),
        NatsConfig(tls_ca="/does/not/exist.pem"),
        NatsConfig(nkey_seed_file="/does/not/exist.nk"),
    ],
)
async def test_what_waiting_cannot_heal_is_a_configuration_error(config: NatsConfig) -> None:
    bus = NatsBus(config)
    with pytest.raises(ConfigError):
        await bus.start()
    await bus.close()


async def test_a_bus_is_started_once(serve: Serve) -> None:
    async with running(NatsConfig(urls=(serve("").url,))) as (bus, _):
        with pytest.raises(LocalError):
            await bus.start()


async def test_before_start_and_after_close_nothing_is_sent(serve: Serve) -> None:
    bus = NatsBus(NatsConfig(urls=(serve("").url,)))
    with pytest.raises(BusOverflow):
        bus.publish("s", b"")
    early = Listener()
    await bus.subscribe("s", early)
    await bus.start()
    bus.publish("s", b"1")
    await early.have(1)
    await bus.close()
    with pytest.raises(BusError):
        bus.publish("s", b"")
    with pytest.raises(BusError):
        await bus.subscribe("s", early)

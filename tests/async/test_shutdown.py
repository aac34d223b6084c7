"""Starting and leaving, with real processes and servers: one line for the operator, nobody waits
for ever, and clients are told."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.contract.etcd_server import EtcdServer
from tests.contract.nats_server import NatsServer, free_port
from tests.integration.process import PATIENCE_S, Process, baton

SLOW = ("--sim-step-ms=20",)


class Servers:
    def __init__(self, folder: Path) -> None:
        self.nats = NatsServer(folder)
        self.etcd = EtcdServer(folder)

    @property
    def flags(self) -> tuple[str, ...]:
        return (f"--nats={self.nats.url}", f"--etcd={self.etcd.url}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    servers.etcd.launch()
    servers.nats.start()
    servers.etcd.wait_ready()
    yield servers
    servers.nats.kill()
    servers.etcd.kill()


def worker(servers: Servers, namespace: str, name: str, *flags: str) -> tuple[str, ...]:
    common = ("--engine=simulated", "--served-model-name=m", f"--namespace={namespace}")
    return ("worker", f"--name={name}", *common, *servers.flags, *flags)


class Fleet:
    """One router and some workers of both roles."""

    def __init__(self, router: Process, port: int, workers: list[Process]) -> None:
        self.router = router
        self.workers = workers
        self.url = f"http://127.0.0.1:{port}/v1/completions"

    @asynccontextmanager
    async def stream(self, max_tokens: int) -> "AsyncIterator[Stream]":
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": True}
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.post(self.url, json=body) as response:
                    if response.status != 200:  # the router has not seen the worker yet
                        await asyncio.sleep(0.02)
                        continue
                    yield Stream(response)
                    return


class Stream:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.num_chunks = 0
        self.finish = ""
        self.error = ""

    async def next(self) -> bool:
        """One more event; False after the last one."""
        async with asyncio.timeout(PATIENCE_S):
            async for line in self._response.content:
                if line.strip() == b"data: [DONE]":
                    return False
                if line.startswith(b"data: "):
                    self._take(json.loads(line[6:]))
                    return True
        return False

    def _take(self, event: dict[str, object]) -> None:
        if "error" in event:
            self.error = event["error"]["code"]  # type: ignore[index]
            return
        self.num_chunks += 1
        self.finish = event["choices"][0].get("finish_reason") or ""  # type: ignore[index]

    async def rest(self) -> None:
        while await self.next():
            pass


@asynccontextmanager
async def fleet(servers: Servers, namespace: str, *, workers: int = 1) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        port = free_port()
        flags = (f"--namespace={namespace}", f"--port={port}", *servers.flags)
        router = await stack.enter_async_context(baton("router", *flags))
        started = [
            await stack.enter_async_context(baton(*worker(servers, namespace, f"w{n}", *SLOW)))
            for n in range(workers)
        ]
        for process in started:
            await process.says("worker ready")
        await router.says("router ready")
        for number in range(workers):
            await router.says(f"worker listed worker=w{number}")
        yield Fleet(router, port, started)


def no_traceback(process: Process) -> bool:
    return not any("Traceback" in line for line in process.lines)


# -- one line for the operator


async def test_a_twin_is_refused_and_a_dead_ones_name_is_free_at_once(servers: Servers) -> None:
    command = worker(servers, "twin", "w", "--etcd-ttl-ms=60000")
    async with baton(*command) as first, AsyncExitStack() as stack:
        await first.says("worker ready")
        second = await stack.enter_async_context(baton(*command))
        assert await second.exit() == 2
        (line,) = [line for line in second.lines if line.startswith("baton: ")]
        assert "worker id 'w' is in use by a living process" in line
        assert no_traceback(second)
        first.kill()
        await first.exit()
        third = await stack.enter_async_context(baton(*command))
        before = time.monotonic()
        await third.says("worker ready")
        assert time.monotonic() - before < 10.0  # and not the 60 s of the old lease
        third.terminate()
        assert await third.exit() == 0
        assert no_traceback(third)


@pytest.mark.parametrize("wrong", ["kv", "metrics", "ttl"])
async def test_a_worker_that_cannot_start_says_why_in_one_line(
    servers: Servers, wrong: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        flags = {
            "kv": "--sim-kv-bytes-per-token=8",
            "metrics": f"--metrics-port={taken.getsockname()[1]}",
            "ttl": "--etcd-ttl-ms=10",
        }
        async with baton(*worker(servers, "wrong", "w", flags[wrong])) as process:
            assert await process.exit() == 2
            assert len([line for line in process.lines if line.startswith("baton: ")]) == 1
            assert no_traceback(process)


# -- leaving


async def test_a_draining_router_lets_its_streams_finish(servers: Servers) -> None:
    async with fleet(servers, "drain") as running:
        async with running.stream(40) as stream:
            await stream.next()
            running.router.terminate()
            await running.router.says("draining requests=1")
            await stream.rest()
            assert (stream.finish, stream.error, stream.num_chunks) == ("length", "", 40)
        assert await running.router.exit() == 0
        assert no_traceback(running.router)


async def test_a_second_signal_tells_the_clients_and_leaves(servers: Servers) -> None:
    async with fleet(servers, "now") as running:
        async with running.stream(5000) as stream:
            await stream.next()
            running.router.terminate()
            await running.router.says("draining requests=1")
            running.router.terminate()
            await stream.rest()
            assert stream.error == "shutting_down"
        assert await running.router.exit(within_s=5.0) == 0
        assert no_traceback(running.router)
        (process,) = running.workers
        process.terminate()
        assert await process.exit(within_s=5.0) == 0
        assert no_traceback(process)


async def test_a_draining_worker_finishes_its_streams(servers: Servers) -> None:
    """Both drain: who has nothing to do leaves at once, the other one when it is done."""
    async with fleet(servers, "leave", workers=2) as running, running.stream(100) as stream:
        await stream.next()
        for process in running.workers:
            process.terminate()
            await process.says("draining worker")
        ended = [asyncio.create_task(process.exit()) for process in running.workers]
        done, pending = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [0]
        await stream.rest()
        assert (stream.finish, stream.error, stream.num_chunks) == ("length", "", 100)
        assert [await task for task in pending] == [0]


async def test_what_a_worker_told_twice_leaves_goes_on_elsewhere(
    servers: Servers,
) -> None:
    async with fleet(servers, "soft", workers=2) as running, running.stream(100) as stream:
        await stream.next()
        busy = await _busy(running)
        for _ in range(2):
            busy.terminate()
            await busy.says("draining worker")
        assert await busy.exit(within_s=5.0) == 0
        assert no_traceback(busy)
        await stream.rest()
        assert (stream.finish, stream.error, stream.num_chunks) == ("length", "", 100)
        assert "cause=aborted" in await running.router.says("resume ")


async def _busy(running: Fleet) -> Process:
    """The worker that does not drain at once."""
    url = running.url.replace("/v1/completions", "/metrics")
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text = await response.text()
    for number, process in enumerate(running.workers):
        for line in text.splitlines():
            ours = line.startswith("baton_worker_reservations") and f'"w{number}"' in line
            if ours and float(line.rpartition(" ")[2]) > 0:
                return process
    raise AssertionError(text)


async def test_nobody_needs_nats_or_etcd_to_leave(tmp_path: Path) -> None:
    servers = Servers(tmp_path)
    servers.etcd.launch()
    servers.nats.start()
    servers.etcd.wait_ready()
    try:
        async with fleet(servers, "dead") as running:
            servers.nats.kill()
            servers.etcd.kill()
            processes = [running.router, *running.workers]
            for process in processes:
                process.terminate()
            for process in processes:
                assert await process.exit(within_s=15.0) == 0
                assert no_traceback(process)
    finally:
        servers.nats.kill()
        servers.etcd.kill()


async def test_who_never_found_nats_or_etcd_leaves_too(tmp_path: Path) -> None:
    servers = Servers(tmp_path)
    port = free_port()
    router = ("router", f"--port={port}", *servers.flags)
    async with baton(*worker(servers, "never", "w")) as one, baton(*router) as two:
        for process in (one, two):
            await process.says("WARNING baton.bus")
            process.terminate()
        for process in (one, two):
            assert await process.exit(within_s=15.0) == 0
            assert no_traceback(process)

"""A router that leaves tells every client of its HTTP front, whatever its request waits for."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.sampling import Sampling
from router.admin import Admin
from router.answers import Answer
from router.catalog import Catalog
from router.choices import ChoiceSpec
from router.http import HttpApi, new_request_id
from router.requests import Front, Prepared
from router.running import Running
from tests.unit.router.dispatch_world import dispatching

PATIENCE_S = 10.0
LEAVING = ClientError(503, "the router is shutting down", code="shutting_down", retry_after_s=1)


class SlowFront:
    """Prepares one choice when it is told to go on."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.go = asyncio.Event()

    async def completion(self, body: bytes, request_id: str) -> Prepared:
        self.has_begun.set()
        await self.go.wait()
        prompt = Tokens(pack_ids(range(16)))
        spec = ChoiceSpec(f"{request_id}/0", 0, "m", prompt, 16, Sampling(8, 0.0))
        return Prepared(Answer("text", request_id, "m", 1), [spec], 1, body == b"stream", False)

    chat = completion


class Door:
    """The HTTP front of a router, on a socket."""

    def __init__(self, front: SlowFront, running: Running, runner: web.AppRunner) -> None:
        self.front = front
        self.running = running
        self.runner = runner

    async def ask(self, body: bytes) -> tuple[int, dict[str, Any], str]:
        """Status, body, and `Retry-After`."""
        [(host, port)] = self.runner.addresses
        url = f"http://{host}:{port}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, data=body) as response:
            text = await response.text()
            return response.status, json.loads(text), response.headers.get("Retry-After", "")


@asynccontextmanager
async def opened() -> AsyncIterator[Door]:
    async with dispatching() as world:
        front = SlowFront()
        running = Running(world.dispatch, new_request_id)
        api = HttpApi(
            front=cast("Front", front),
            dispatch=world.dispatch,
            running=running,
            catalog=cast("Catalog", None),
            admin=cast("Admin", SimpleNamespace(routes=lambda *_: [])),
            metrics=world.metrics,
            api_keys=(),
            max_body_bytes=1000,
            client_stall_s=10.0,
            ping_s=10.0,
        )
        runner = web.AppRunner(
            api.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield Door(front, running, runner)
        finally:
            await runner.cleanup()


@pytest.mark.filterwarnings("ignore::aiohttp.web.NotAppKeyWarning")
@pytest.mark.parametrize("body", [b"stream", b"whole"])
async def test_a_request_that_is_prepared_while_the_router_leaves_gets_its_503(body: bytes) -> None:
    async with opened() as door, asyncio.timeout(PATIENCE_S):
        asked = asyncio.create_task(door.ask(body))
        await door.front.has_begun.wait()
        door.running.abort_all(LEAVING)
        leaving = asyncio.create_task(door.runner.cleanup())
        await asyncio.sleep(0.1)
        door.front.go.set()
        status, said, retry_after = await asked
        await leaving
        assert (status, said["error"]["code"], retry_after) == (503, "shutting_down", "1")
        assert len(door.running) == 0

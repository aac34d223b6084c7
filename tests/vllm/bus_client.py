"""Who speaks to workers on the bus as a router does, in whatever order a test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats

from protocol.codec import decode_out, encode
from protocol.jobs import Cancel, Decode, JobEnvelope, Prefill
from protocol.out import Failed, Out, Prefilled, StepFrame
from protocol.subjects import Subjects
from tests.e2e.fleet import Fleet

NAME = "forger"


class BusClient:
    """What workers said to us, by attempt."""

    def __init__(self, client: Any, fleet: Fleet) -> None:
        self._client = client
        self._fleet = fleet
        self._subjects = Subjects("default")
        self._heard = asyncio.Condition()
        self.ids: dict[int, list[int]] = {}
        self.ended: dict[int, Prefilled | Failed | str] = {}
        """An outcome, or the word for the end of a stream."""

    async def listen(self, *workers: str) -> None:
        for worker in workers:
            await self._client.subscribe(self._subjects.out(NAME, worker), cb=self._on_message)
        await self._client.flush()

    async def _on_message(self, message: Any) -> None:
        async with self._heard:
            for said in decode_out(message.data).outs:
                self._take(said)
            self._heard.notify_all()

    def _take(self, said: Out) -> None:
        if isinstance(said, Prefilled | Failed):
            self.ended[said.attempt] = said
        elif isinstance(said, StepFrame):
            for delta in said.deltas:
                self.ids.setdefault(delta.attempt, []).extend(delta.ids)
                if delta.finish:
                    self.ended[delta.attempt] = delta.finish

    async def send(self, worker: str, job: Prefill | Decode | Cancel) -> None:
        incarnation = self._fleet.worker(worker)["incarnation"]
        envelope = encode(JobEnvelope(NAME, [job]))
        await self._client.publish(self._subjects.jobs(worker, incarnation), envelope)
        await self._client.flush()

    async def outcome(self, attempt: int, *, timeout_s: float) -> Prefilled | Failed | str | None:
        """None if there was none in that time."""
        try:
            async with asyncio.timeout(timeout_s), self._heard:
                await self._heard.wait_for(lambda: attempt in self.ended)
        except TimeoutError:
            pass
        return self.ended.get(attempt)


@asynccontextmanager
async def bus_client(fleet: Fleet, *workers: str) -> AsyncIterator[BusClient]:
    connection = await nats.connect(fleet.nats_url)
    try:
        client = BusClient(connection, fleet)
        await client.listen(*workers)
        yield client
    finally:
        await connection.close()

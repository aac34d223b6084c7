"""What a NATS client hears of its answer: over outages, full buffers, and a router that leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from protocol.blocks import pack_ids
from protocol.bus import Message, Subscription
from protocol.errors import ClientError
from protocol.jobs import Cancel, Decode, Prefill, Tokens
from protocol.memory_bus import MemoryBus
from protocol.out import Decoding, Delta, Prefilled, StepFrame
from protocol.sampling import Sampling
from router import nats_api
from router.answers import Answer
from router.choices import ChoiceSpec
from router.nats_api import MAX_REPLY, NatsApi
from router.requests import Front, Prepared
from router.running import Running
from router.scheduling.limits import Limits
from tests.unit.router.dispatch_world import (
    SUBJECTS,
    DispatchWorld,
    WireWorker,
    delta,
    dispatching,
    handle,
)

PATIENCE_S = 10.0
INBOX = "client.inbox"
SUBJECT = SUBJECTS.all_api.replace(">", "completions")
LEAVING = ClientError(503, "the router is shutting down", code="shutting_down", retry_after_s=1)


class Listener:
    """A NATS client's end: what came on its inbox while it listened."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.heard: list[Message] = []
        self.changed = asyncio.Event()
        self.subscription: Subscription | None = None

    async def listen(self) -> None:
        self.subscription = await self.bus.subscribe(INBOX, self._on_message)

    async def stop(self) -> None:
        assert self.subscription is not None
        await self.subscription.close()

    def _on_message(self, message: Message) -> None:
        self.heard.append(message)
        self.changed.set()

    def ask(self, *, stream: bool = False, reply: str = INBOX) -> None:
        headers = {"x-request-id": "r"}
        self.bus.publish(SUBJECT, b"stream" if stream else b"", reply=reply, headers=headers)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def end(self) -> str:
        await self.until(lambda: self.statuses)
        return self.statuses[0]

    @property
    def statuses(self) -> list[str]:
        return [m.headers["Baton-Status"] for m in self.heard if m.headers is not None]

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(message.payload) for message in self.heard if message.payload]

    @property
    def code(self) -> str:
        return str(self.bodies[-1]["error"]["code"])


class FakeFront:
    """One choice for every body; waits while it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def completion(self, body: bytes, request_id: str) -> Prepared:
        await self.go.wait()
        prompt = Tokens(pack_ids(range(16)))
        spec = ChoiceSpec(f"{request_id}/0", 0, "m", prompt, 16, Sampling(8, 0.0))
        return Prepared(Answer("text", request_id, "m", 1), [spec], 1, body == b"stream", False)


class Api:
    def __init__(self, world: DispatchWorld, listener: Listener, tasks: asyncio.TaskGroup) -> None:
        self.world = world
        self.listener = listener
        self.front = FakeFront()
        self.running = Running(world.dispatch, lambda: "f" * 24)
        self.api = NatsApi(
            bus=world.bus,
            subjects=SUBJECTS,
            front=cast("Front", self.front),
            dispatch=world.dispatch,
            running=self.running,
            tasks=tasks,
            max_body_bytes=1000,
            models=lambda: b"{}",
        )

    async def workers(self) -> tuple[WireWorker, WireWorker]:
        return await self.world.worker("p", "prefill"), await self.world.worker("d", "decode")

    async def flowing(self, p: WireWorker, d: WireWorker) -> int:
        """A stream that has had its first two tokens; its attempt on `d`."""
        self.listener.ask(stream=True)
        prefill = await p.job(Prefill)
        assert isinstance(prefill, Prefill)
        p.say(Prefilled(prefill.attempt, 16, 0, delta(prefill.attempt, 0), handle()))
        decode = await d.job(Decode)
        assert isinstance(decode, Decode)
        d.say(Decoding(decode.attempt), StepFrame([delta(decode.attempt, 1)]))
        await self.listener.until(lambda: len(self.listener.bodies) == 2)
        return decode.attempt

    async def story(self) -> dict[str, Any]:
        """When the request is over."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.running):  # noqa: ASYNC110  the end of a request is no event
                await asyncio.sleep(0.01)
        story = self.world.dispatch.stories.of("r")
        assert story is not None
        return story


class _Over(Exception):
    pass


@asynccontextmanager
async def serving() -> AsyncIterator[Api]:
    """Requests that still run when the block ends are cancelled, as when a router leaves."""
    limits = Limits(accept_timeout_s=30.0, silence_timeout_s=30.0)
    async with dispatching(limits) as world:
        bus = MemoryBus(world.hub)
        await bus.start()
        listener = Listener(bus)
        await listener.listen()
        try:
            async with asyncio.TaskGroup() as tasks:
                api = Api(world, listener, tasks)
                await api.api.start()
                yield api
                raise _Over
        except* _Over:
            pass
        finally:
            await world.settle()
            await bus.close()


def finish(worker: WireWorker, prefill: object, text: str = "x") -> None:
    """The answer in a piece, of one token."""
    assert isinstance(prefill, Prefill)
    first = Delta(prefill.attempt, 0, [0], text, "length")
    worker.say(Prefilled(prefill.attempt, 16, 0, first))


async def outage(api: Api) -> None:
    """The router is back at once, the client later."""
    await api.listener.stop()
    api.world.hub.down()
    api.world.hub.up()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_api, "PAUSES", (0.02,) * 5)


# --- an outage ---


async def test_a_stream_over_an_outage_ends_with_an_error_that_is_heard() -> None:
    async with serving() as api:
        p, d = await api.workers()
        attempt = await api.flowing(p, d)
        await outage(api)
        d.say(StepFrame([delta(attempt, 2)]))  # the next chunk, which nobody hears
        await asyncio.sleep(0.1)
        assert await d.job(Cancel) == Cancel(attempt)
        await api.listener.listen()
        assert await api.listener.end() == "503"
        assert api.listener.code == "interrupted"
        assert len(api.listener.bodies) == 3, "said twice, or a chunk after the hole"
        last = api.listener.heard[-1]
        assert last.headers is not None
        assert last.headers["Retry-After"] == "1"
        story = await api.story()
        assert (story["status"], story["error"]["code"]) == (503, "interrupted")


async def test_a_stream_that_ends_during_an_outage_is_not_whole() -> None:
    async with serving() as api:
        p, d = await api.workers()
        await api.flowing(p, d)
        [choice] = api.world.dispatch._choices.values()
        sink, spec = choice.sink, choice.spec
        api.world.hub.down()
        sink.delta(choice, delta(1, 2, finish=True))
        sink.ended(choice, None)
        api.world.dispatch.cancel(spec.choice)
        await asyncio.sleep(0.1)
        assert api.listener.statuses == []
        api.world.hub.up()
        assert await api.listener.end() == "503"
        assert api.listener.code == "interrupted"


async def test_a_stream_that_begins_after_an_outage_for_who_is_not_back_yet() -> None:
    """It was in preparation; the first chunk is lost."""
    async with serving() as api:
        p, d = await api.workers()
        api.front.go.clear()
        api.listener.ask(stream=True)
        await api.world.settle()
        await outage(api)
        api.front.go.set()
        prefill = await p.job(Prefill)
        assert isinstance(prefill, Prefill)
        p.say(Prefilled(prefill.attempt, 16, 0, delta(prefill.attempt, 0), handle()))
        await d.job(Decode)
        await asyncio.sleep(0.1)
        await api.listener.listen()
        assert await api.listener.end() == "503"
        assert api.listener.code == "interrupted"


@pytest.mark.parametrize("is_down", [False, True])
async def test_an_answer_in_a_piece_is_said_until_it_is_heard(is_down: bool) -> None:
    """Made while the bus was away, or when it was back and the client was not."""
    async with serving() as api:
        p, _ = await api.workers()
        api.listener.ask()
        prefill = await p.job(Prefill)
        if is_down:
            await api.listener.stop()
            [choice] = api.world.dispatch._choices.values()
            api.world.hub.down()
            choice.sink.delta(choice, Delta(1, 0, [0], "x", "length"))
            choice.sink.ended(choice, None)
            await asyncio.sleep(0.05)
            api.world.hub.up()
        else:
            await outage(api)
            finish(p, prefill)
        await asyncio.sleep(0.4)
        await api.listener.listen()
        assert await api.listener.end() == "200"
        [body] = api.listener.bodies
        assert body["choices"][0]["text"] == "x"
        assert (await api.story())["status"] == 200


async def test_who_does_not_come_back_is_given_up(hasty: None) -> None:
    async with serving() as api:
        p, d = await api.workers()
        await api.flowing(p, d)
        await outage(api)
        assert (await api.story())["status"] is None


async def test_who_hears_no_chunk_has_gone_when_there_was_no_outage_lately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nats_api, "GRACE_S", 0.0)
    async with serving() as api:
        api.world.hub.down()
        api.world.hub.up()
        p, d = await api.workers()
        attempt = await api.flowing(p, d)
        await api.listener.stop()
        d.say(StepFrame([delta(attempt, 2)]))
        assert await d.job(Cancel) == Cancel(attempt)
        await api.listener.listen()
        assert (await api.story())["status"] is None
        assert api.listener.statuses == []


# --- a full bus ---


async def test_a_stream_with_a_hole_ends_with_an_error() -> None:
    async with serving() as api:
        p, d = await api.workers()
        attempt = await api.flowing(p, d)
        bus = api.world.bus
        full, bus._pending_bytes = bus._pending_bytes, 10
        d.say(StepFrame([delta(attempt, 2)]), StepFrame([delta(attempt, 3)]))
        await api.world.workers[1].bus.flush(timeout_s=PATIENCE_S)
        await asyncio.sleep(0.05)
        bus._pending_bytes = full
        d.say(StepFrame([delta(attempt, 4, finish=True)]))
        assert await api.listener.end() == "503"
        assert api.listener.code == "interrupted"
        assert len(api.listener.bodies) == 3
        story = await api.story()
        assert (story["status"], story["error"]["code"]) == (503, "interrupted")


async def test_an_answer_that_the_bus_never_takes_is_too_large() -> None:
    async with serving() as api:
        p, _ = await api.workers()
        api.world.bus._pending_bytes = 100_000
        api.listener.ask()
        finish(p, await p.job(Prefill), "x" * 200_000)
        assert await api.listener.end() == "413"
        assert api.listener.code == "answer_too_large"
        story = await api.story()
        assert (story["status"], story["error"]["code"]) == (413, "answer_too_large")


async def test_an_answer_waits_for_room() -> None:
    async with serving() as api:
        p, _ = await api.workers()
        api.listener.ask()
        bus = api.world.bus
        prefill = await p.job(Prefill)
        full, bus._pending_bytes = bus._pending_bytes, -1
        finish(p, prefill)
        await asyncio.sleep(0.1)
        bus._pending_bytes = full
        assert await api.listener.end() == "200"
        assert len(api.listener.bodies) == 1


async def test_an_answer_that_finds_no_room_is_no_answer(hasty: None) -> None:
    async with serving() as api:
        p, _ = await api.workers()
        api.listener.ask()
        prefill = await p.job(Prefill)
        full, api.world.bus._pending_bytes = api.world.bus._pending_bytes, -1
        finish(p, prefill)
        story = await api.story()
        api.world.bus._pending_bytes = full
        assert story["status"] is None
        assert api.listener.heard == []


# --- rubbish ---


async def test_a_reply_subject_that_is_too_long_is_counted_and_not_answered() -> None:
    async with serving() as api:
        registry = api.world.metrics.registry

        def refused() -> float | None:
            labels = {"kind": "bad_message", "cause": "no_inbox"}
            return registry.get_sample_value("baton_events_total", labels)

        api.front.go.clear()
        api.listener.ask(reply="i." + "x" * (MAX_REPLY - 2))
        await api.world.settle()
        assert refused() is None
        assert len(api.running) == 1
        api.listener.ask(reply="i." + "x" * (MAX_REPLY - 1))
        await api.world.settle()
        assert refused() == 1
        assert len(api.running) == 1


async def test_an_answer_that_cannot_be_said_harms_nobody_else() -> None:
    async with serving() as api:
        p, _ = await api.workers()
        api.listener.ask(reply="not a subject")
        finish(p, await p.job(Prefill))
        await api.story()
        api.listener.ask()
        finish(p, await p.job(Prefill, 1))
        assert await api.listener.end() == "200"


# --- a router that leaves ---


async def test_a_request_in_preparation_is_told_when_it_is_prepared() -> None:
    async with serving() as api:
        await api.workers()
        api.front.go.clear()
        api.listener.ask()
        await api.world.settle()
        api.running.abort_all(LEAVING)
        api.front.go.set()
        assert await api.listener.end() == "503"
        assert api.listener.code == "shutting_down"
        assert api.world.dispatch.num_inflight == 0


async def test_a_request_that_is_never_prepared_is_told_too() -> None:
    async with serving() as api:
        listener = api.listener
        api.front.go.clear()
        listener.ask()
        await api.world.settle()
    assert listener.statuses == ["503"]
    assert listener.code == "shutting_down"


async def test_who_asks_a_router_that_leaves_is_told_at_once() -> None:
    async with serving() as api:
        api.running.abort_all(LEAVING)
        api.listener.ask()
        assert await api.listener.end() == "503"
        assert api.listener.code == "shutting_down"
        assert len(api.running) == 0

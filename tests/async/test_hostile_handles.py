"""Forged, replayed, cut, expired and foreign handles, given to a real decode worker over the bus.

Each is refused with a typed failure; nothing is reserved, lent or in quarantine afterwards, and the
next request is served. The workers are real, down to the transport; only the bus is in memory.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from protocol.blocks import pack_ids
from protocol.bus import Message
from protocol.codec import decode_out, encode
from protocol.handoff import FabricOffer, KvHandle, RankKv, ShmOffer, TcpOffer
from protocol.jobs import Decode, Job, JobEnvelope, Prefill, Release, Tokens
from protocol.memory_bus import MemoryBus
from protocol.out import Decoding, Failed, Out, Prefilled, Refused
from protocol.sampling import Sampling
from tests.integration import path_world
from tests.integration.path_world import PATIENCE_S, SMALL, SUBJECTS, PathWorld, WorkerSide, path
from worker.engine.simulated import expected_tokens
from worker.engine.stepper import StepperConfig
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer

PROMPT = [(7 * index) % 250 for index in range(21)]
OTHER = [(11 * index + 3) % 250 for index in range(21)]
GREEDY = Sampling(8, 0.0)
TYPED = {"handle_mismatch", "lease_lost", "transfer_failed"}
Forge = Callable[[KvHandle], KvHandle]


@dataclass
class Stranger:
    """Speaks to workers as a router would, and bends what it heard."""

    world: PathWorld
    bus: MemoryBus
    heard: list[Out] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def on_out(self, message: Message) -> None:
        self.heard += decode_out(message.payload).outs
        self.changed.set()

    def send(self, worker: WorkerSide, job: Job) -> None:
        subject = SUBJECTS.jobs(worker.info.worker_id, worker.info.incarnation)
        self.bus.publish(subject, encode(JobEnvelope("stranger", [job])))

    async def answer(self, attempt: int, kinds: tuple[type, ...]) -> Any:
        def found() -> list[Out]:
            return [o for o in self.heard if isinstance(o, kinds) and o.attempt == attempt]  # type: ignore[union-attr]

        async with asyncio.timeout(PATIENCE_S):
            while not found():
                self.changed.clear()
                await self.changed.wait()
        return found()[0]

    async def lent(self, prompt: list[int], **rest: Any) -> tuple[KvHandle, bytes]:
        """A handle that is good, and the first token."""
        attempt = next(self.numbers)
        job = Prefill(attempt, "evil/0", Tokens(pack_ids(prompt)), GREEDY, **rest)
        self.send(self.world.by_role("prefill")[0], job)
        done = await self.answer(attempt, (Prefilled, Failed))
        assert isinstance(done, Prefilled)
        assert done.handle is not None
        assert done.first is not None
        return done.handle, pack_ids(done.first.ids)

    async def use(self, handle: KvHandle, prompt: list[int], output: bytes, **rest: Any) -> Out:
        """What the decode worker says to it."""
        attempt = next(self.numbers)
        job = Decode(attempt, "evil/0", Tokens(pack_ids(prompt)), GREEDY, handle, output, **rest)
        self.send(self.world.by_role("decode")[0], job)
        said: Out = await self.answer(attempt, (Decoding, Failed, Refused))
        return said

    def release(self, handle: KvHandle) -> None:
        self.send(self.world.by_role("prefill")[0], Release([handle.handle_id]))


TRANSFERS: dict[str, Callable[[], Any]] = {"shm": ShmTransfer, "tcp": TcpTransfer}


@asynccontextmanager
async def hostile(monkeypatch: pytest.MonkeyPatch, transport: str) -> AsyncIterator[Stranger]:
    monkeypatch.setattr(path_world, "ShmTransfer", TRANSFERS[transport])
    async with path(config=replace(SMALL, step_s=0.0)) as world:
        bus = await world._bus()
        stranger = Stranger(world, bus)
        await bus.subscribe(SUBJECTS.out_all("stranger"), stranger.on_out)
        await world.live()
        yield stranger


async def nothing_is_left(stranger: Stranger, *handles: KvHandle) -> None:
    """Both workers are as empty as before, and serve."""
    for handle in handles:
        stranger.release(handle)
    world = stranger.world
    client = world.submit([5, *PROMPT], GREEDY)
    await client.end()
    assert client.error is None
    assert client.ids == expected_tokens([5, *PROMPT], GREEDY, GREEDY.max_tokens, SMALL)
    await world.clean()
    assert world.exits == []


def rank_of(handle: KvHandle, **changes: Any) -> KvHandle:
    [rank] = handle.ranks
    return msgspec.structs.replace(handle, ranks=[msgspec.structs.replace(rank, **changes)])


def offers_of(handle: KvHandle, *offers: Any) -> KvHandle:
    return rank_of(handle, offers=list(offers))


def _shm(handle: KvHandle, **changes: Any) -> KvHandle:
    """The same with a bent offer of shared memory, where it has one."""
    offers = [
        msgspec.structs.replace(offer, **changes) if isinstance(offer, ShmOffer) else offer
        for offer in handle.ranks[0].offers
        if isinstance(offer, ShmOffer)
    ]
    offers = offers or [ShmOffer("boot", 1, 3, 4, 1 << 20, 4096, "t")]
    return offers_of(handle, *offers)


def _tcp(handle: KvHandle, **changes: Any) -> KvHandle:
    offers = [o for o in handle.ranks[0].offers if isinstance(o, TcpOffer)]
    offers = offers or [TcpOffer("127.0.0.1", 1)]
    return offers_of(handle, *(msgspec.structs.replace(offer, **changes) for offer in offers))


def _blocks(handle: KvHandle, change: Callable[[bytes], bytes]) -> KvHandle:
    return rank_of(handle, blocks=change(handle.ranks[0].blocks))


def _with(**changes: Any) -> Forge:
    return lambda handle: msgspec.structs.replace(handle, **changes)


FORGED: dict[str, Forge] = {
    "nonce": lambda h: rank_of(h, nonce=h.ranks[0].nonce ^ 1),
    "nonce 0": lambda h: rank_of(h, nonce=0),
    "nonce negative": lambda h: rank_of(h, nonce=-1),
    "nonce of 65 bits": lambda h: rank_of(h, nonce=-(2**63)),
    "slot of another": lambda h: rank_of(h, slot=h.ranks[0].slot + 1),
    "slot outside": lambda h: rank_of(h, slot=2**31),
    "slot of 64 bits": lambda h: rank_of(h, slot=2**64 - 1),
    "slot negative": lambda h: rank_of(h, slot=-1),
    "blocks cut by a byte": lambda h: _blocks(h, lambda b: b[:-1]),
    "blocks cut by one": lambda h: _blocks(h, lambda b: b[:-4]),
    "no blocks": lambda h: _blocks(h, lambda _: b""),
    "blocks twice": lambda h: _blocks(h, lambda b: b * 2),
    "blocks by the million": lambda h: _blocks(h, lambda b: b * 100_000),
    "blocks outside": lambda h: _blocks(h, lambda b: b"\xff" * len(b)),
    "fewer tokens": lambda h: msgspec.structs.replace(h, num_tokens=h.num_tokens - 1),
    "more tokens": lambda h: msgspec.structs.replace(h, num_tokens=h.num_tokens + 1),
    "no tokens": _with(num_tokens=0),
    "negative tokens": _with(num_tokens=-5),
    "tokens of 63 bits": _with(num_tokens=2**62),
    "block size": _with(block_size=8),
    "block size 0": _with(block_size=0),
    "block size negative": _with(block_size=-4),
    "content": lambda h: msgspec.structs.replace(h, content_hash=bytes(16)),
    "content cut": lambda h: msgspec.structs.replace(h, content_hash=h.content_hash[:-1]),
    "no content": _with(content_hash=b""),
    "no ranks": _with(ranks=[]),
    "two ranks": lambda h: msgspec.structs.replace(h, ranks=h.ranks * 2),
    "opaque alone": _with(ranks=[], opaque=msgspec.Raw(b"\x81\xa1a\x01")),
    "no offers": offers_of,
    "fabric rubbish": lambda h: offers_of(h, FabricOffer("nixl", "a", b"\xff" * 99, 1, 2)),
    "fabric unknown": lambda h: offers_of(h, FabricOffer("", "", b"", -1, -1, -1, -1)),
    "shm boot": lambda h: _shm(h, boot_id="another"),
    "shm pid": lambda h: _shm(h, pid=1),
    "shm pid negative": lambda h: _shm(h, pid=-1),
    "shm pid huge": lambda h: _shm(h, pid=2**62),
    "shm fd": lambda h: _shm(h, arena_fd=0, lease_fd=1),
    "shm fds swapped": lambda h: _shm(h, arena_fd=10**9, lease_fd=-1),
    "shm sizes": lambda h: _shm(h, arena_bytes=2**62, lease_bytes=2**62),
    "shm no sizes": lambda h: _shm(h, arena_bytes=0, lease_bytes=0),
    "shm negative sizes": lambda h: _shm(h, arena_bytes=-1, lease_bytes=-4096),
    "shm token": lambda h: _shm(h, token="x" * 32),
    "shm token empty": lambda h: _shm(h, token=""),
    "tcp port": lambda h: _tcp(h, port=1),
    "tcp port huge": lambda h: _tcp(h, port=2**40),
    "tcp port negative": lambda h: _tcp(h, port=-1),
    "tcp name": lambda h: _tcp(h, host="no.such.host"),
    "tcp host rubbish": lambda h: _tcp(h, host="\x00 ;'%%s"),
    "tcp no host": lambda h: _tcp(h, host=""),
}


@pytest.mark.parametrize("transport", TRANSFERS)
async def test_a_forged_handle_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """One after the other in one world: what the first left would show in the second."""
    async with hostile(monkeypatch, transport) as stranger:
        good, token = await stranger.lent(PROMPT)
        for name, forge in FORGED.items():
            said = await stranger.use(forge(good), PROMPT, token)
            assert isinstance(said, Failed), (name, said)
            assert said.code in TYPED, (name, said)
            assert said.message, name
            assert len(said.message) < 500, name
        assert isinstance(await stranger.use(good, PROMPT, token), Decoding)
        await nothing_is_left(stranger, good)


@pytest.mark.parametrize("transport", TRANSFERS)
async def test_a_foreign_handle_is_refused(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """Of another prompt, salt, model or output: what is lent is real, only not for this."""
    async with hostile(monkeypatch, transport) as stranger:
        good, token = await stranger.lent(PROMPT)
        salted, salted_token = await stranger.lent(PROMPT, cache_salt="mine")
        other, other_token = await stranger.lent(OTHER)
        crossed = msgspec.structs.replace(other, content_hash=bytes(reversed(other.content_hash)))
        for handle, output, salt in (
            (other, token, ""), (salted, salted_token, ""), (good, token, "mine"),
            (good, token, "yours"), (crossed, token, ""),
        ):  # fmt: skip
            said = await stranger.use(handle, PROMPT, output, cache_salt=salt)
            assert isinstance(said, Failed), said
            assert said.code == "handle_mismatch"
        # the ranks of one under the name of another
        mixed = msgspec.structs.replace(good, ranks=[_ended(other.ranks[0])])
        said = await stranger.use(mixed, PROMPT, token)
        assert isinstance(said, Failed)
        assert said.code in TYPED
        await nothing_is_left(stranger, good, salted, other)
        assert other_token


def _ended(rank: RankKv) -> RankKv:
    """As if that lease had ended: the blocks are real, the nonce is nobody's."""
    return msgspec.structs.replace(rank, nonce=rank.nonce ^ 0xFF)


@pytest.mark.parametrize("transport", TRANSFERS)
async def test_a_handle_that_was_given_back_is_lost(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Used, used again while it lives, released, and used once more; and again when its slot has
    another lease."""
    async with hostile(monkeypatch, transport) as stranger:
        good, token = await stranger.lent(PROMPT)
        for _ in range(2):
            assert isinstance(await stranger.use(good, PROMPT, token), Decoding)
        source = stranger.world.by_role("prefill")[0].engine
        stranger.release(good)
        await source.drain()
        for _ in range(2):
            # a decode worker that still has the blocks of its own needs none of them
            said = await stranger.use(good, PROMPT, token)
            assert isinstance(said, Decoding) or said.code == "lease_lost"  # type: ignore[union-attr]
        fresh, fresh_token = await stranger.lent(OTHER)
        stranger.release(fresh)
        await source.drain()
        said = await stranger.use(fresh, OTHER, fresh_token)
        assert isinstance(said, Failed)
        assert said.code == "lease_lost"
        await nothing_is_left(stranger)


async def test_an_expired_handle_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody renews it: the source ends it by itself."""
    made: list[Any] = []
    real = StepperConfig

    def short(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **{**kwargs, "lease_s": 0.05}))
        return made[-1]

    monkeypatch.setattr(path_world, "StepperConfig", short)
    async with hostile(monkeypatch, "shm") as stranger:
        good, token = await stranger.lent(PROMPT)
        await stranger.world.by_role("prefill")[0].engine.drain()
        said = await stranger.use(good, PROMPT, token)
        assert isinstance(said, Failed)
        assert said.code == "lease_lost"
        assert made
        for worker in stranger.world.workers:
            await worker.engine.drain()
            assert worker.engine.load().free_blocks == worker.engine.load().num_blocks

"""A transport that fails with a source is replaced by the next one, inside the same attempt."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from protocol.handoff import Offer
from tests.unit.worker.engine_world import (
    GREEDY,
    PATIENCE_S,
    SMALL,
    Attempt,
    HeldTransfer,
    World,
    expected_of,
    hand_over,
    prompt_of,
    running,
)
from worker.engine.pairs import MARK_S
from worker.kv.arena import Arena, LeaseTable, ScratchWords
from worker.transfer.base import OnEnd, PassedOver, PullSpec, PullTicket, Transfer, TransferEnd
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer


class FailingTransfer:
    """A real transport whose data, or whose word, ends in an error while `fails` says so."""

    def __init__(self, inner: Transfer, fails: str = "data") -> None:
        self._inner = inner
        self.fails = fails

    @property
    def name(self) -> str:
        return self._inner.name

    def start(self, arena: Arena, leases: LeaseTable, scratch: ScratchWords) -> None:
        if self.fails == "start":
            raise PassedOver("no such backend")
        self._inner.start(arena, leases, scratch)

    def offer(self) -> Offer:
        return self._inner.offer()

    def refuse(self, offer: Offer) -> str:
        return self._inner.refuse(offer)

    def pull(self, spec: PullSpec, on_end: OnEnd) -> PullTicket:
        return self._inner.pull(spec, _broken(on_end) if self.fails == "data" else on_end)

    def read_word(self, spec: PullSpec, scratch_slot: int, on_end: OnEnd) -> None:
        end = _broken(on_end) if self.fails == "word" else on_end
        self._inner.read_word(spec, scratch_slot, end)

    def num_live(self) -> int:
        return self._inner.num_live()

    def stop(self) -> bool:
        return self._inner.stop()


def _broken(on_end: OnEnd) -> OnEnd:
    return lambda end: on_end(TransferEnd(ok=False, reason="link down"))


@dataclass
class Pair:
    p: World
    d: World

    async def hand_over(self, salt: int = 0) -> Attempt:
        """With another prompt each time: nothing comes from the cache."""
        _, attempt = await hand_over(self.p, self.d, prompt_of(14, salt))
        return attempt


@asynccontextmanager
async def paired(transfers: Sequence[Transfer]) -> AsyncIterator[Pair]:
    async with (
        running(transfers=[ShmTransfer(), TcpTransfer()], worker="p") as p,
        running(transfers=transfers, worker="d") as d,
    ):
        yield Pair(p, d)


def is_whole(attempt: Attempt, salt: int = 0) -> bool:
    return attempt.ids == expected_of(prompt_of(14, salt), GREEDY, SMALL)[1:]


async def test_the_next_transport_takes_over_in_the_same_attempt() -> None:
    async with paired([FailingTransfer(ShmTransfer()), TcpTransfer()]) as pair:
        attempt = await pair.hand_over()
        assert is_whole(attempt)
        assert attempt.decoding is not None
        assert (attempt.decoding.transport, attempt.decoding.source) == ("tcp", "p")
        assert attempt.decoding.transport_reason == "shm: failed before"
        stats = pair.d.stepper.stats()
        assert stats.transfers == {("shm", "transfer_failed"): 1, ("tcp", "ok"): 1}
        assert stats.pairs == {"p": ("tcp", "shm: failed before")}


async def test_a_word_that_cannot_be_read_is_a_failure_as_well() -> None:
    async with paired([FailingTransfer(ShmTransfer(), "word"), TcpTransfer()]) as pair:
        assert is_whole(await pair.hand_over())
        transfers = pair.d.stepper.stats().transfers
        assert transfers == {("shm", "transfer_failed"): 1, ("tcp", "ok"): 1}


async def test_what_failed_is_passed_over_for_a_while_and_then_tried_again() -> None:
    failing = FailingTransfer(ShmTransfer())
    async with paired([failing, TcpTransfer()]) as pair:
        for salt in range(3):
            assert is_whole(await pair.hand_over(salt), salt)
        assert pair.d.stepper.stats().transfers["shm", "transfer_failed"] == 1
        failing.fails = ""
        pair.d.clock.ahead_s += MARK_S
        attempt = await pair.hand_over(3)
        assert attempt.decoding is not None
        assert (attempt.decoding.transport, attempt.decoding.transport_reason) == (
            "shm",
            "preferred",
        )


async def test_the_only_one_is_tried_again_at_once_though_it_failed() -> None:
    failing = FailingTransfer(ShmTransfer())
    async with paired([failing]) as pair:
        assert (await pair.hand_over()).failed is not None
        failing.fails = ""
        assert is_whole(await pair.hand_over())


async def test_all_failed_says_what_each_said_and_leaves_nothing() -> None:
    broken = [FailingTransfer(ShmTransfer()), FailingTransfer(TcpTransfer())]
    async with paired(broken) as pair:
        failed = (await pair.hand_over()).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "transfer_failed")
        assert failed.message == "shm: link down; tcp: link down"
        assert pair.d.is_clean()


async def test_a_lost_lease_is_not_tried_again() -> None:
    """The blocks are gone, whatever carries them."""
    transfer = HeldTransfer(ShmTransfer())
    async with paired([transfer, TcpTransfer()]) as pair:
        lent = pair.p.prefill(prompt_of(14))
        result = (await pair.p.over(lent)).prefilled
        assert result is not None
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=[97])
        await transfer.arrived.wait()
        transfer.arrived.clear()
        pair.p.stepper.cancel(lent)
        await pair.p.idle()
        transfer.let_one_go()
        await transfer.arrived.wait()
        transfer.let_one_go()
        failed = (await pair.d.over(key)).failed
        assert failed is not None
        assert failed.code == "lease_lost"
        assert pair.d.stepper.stats().transfers == {("shm", "lease_lost"): 1}


async def test_a_silent_pull_is_not_tried_again_for_its_blocks_are_not_ours_yet() -> None:
    transfer = HeldTransfer(ShmTransfer())
    async with paired([transfer, TcpTransfer()]) as pair:
        lent = pair.p.prefill(prompt_of(14))
        result = (await pair.p.over(lent)).prefilled
        assert result is not None
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=[97])
        async with asyncio.timeout(PATIENCE_S):
            await transfer.arrived.wait()
        for _ in range(2):
            await pair.d.over(pair.d.decode([]))
            pair.d.clock.ahead_s += 61.0
            pair.d.stepper.renew([])
        failed = (await pair.d.over(key)).failed
        assert failed is not None
        assert failed.code == "transfer_failed"
        assert pair.d.stepper.load().quarantined_blocks == 4
        assert pair.d.stepper.stats().transfers == {("shm", "transfer_failed"): 1}
        transfer.let_one_go()
        await pair.d.over(pair.d.decode([]))
        pair.p.stepper.cancel(lent)


async def test_cancel_between_two_transports_leaves_nothing() -> None:
    tcp = HeldTransfer(TcpTransfer())
    async with paired([FailingTransfer(ShmTransfer()), tcp]) as pair:
        lent = pair.p.prefill(prompt_of(14))
        result = (await pair.p.over(lent)).prefilled
        assert result is not None
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=[97])
        async with asyncio.timeout(PATIENCE_S):
            await tcp.arrived.wait()
        pair.d.stepper.cancel(key)
        await pair.d.over(pair.d.decode([]))
        assert pair.d.stepper.load().quarantined_blocks == 4
        tcp.let_one_go()
        await pair.d.over(pair.d.decode([]))
        assert pair.d.is_clean()
        pair.p.stepper.cancel(lent)


async def test_a_transport_that_does_not_start_is_done_without() -> None:
    reasons = {"shm": "auto", "tcp": "auto"}
    failing = FailingTransfer(ShmTransfer(), "start")
    async with running(transfers=[failing, TcpTransfer()], transport_reasons=reasons) as d:
        assert d.info.transports == ("tcp",)
        assert d.info.transport_reasons == {"shm": "passed over: no such backend", "tcp": "auto"}


async def test_a_prompt_longer_than_the_buffer_is_pulled_alone() -> None:
    async with (
        running(worker="p") as p,
        running(worker="d", max_tokens_in_flight=8) as d,
    ):
        given = [await hand_over(p, d, prompt_of(40, salt)) for salt in range(3)]
        for salt, (_, attempt) in enumerate(given):
            assert attempt.ids == expected_of(prompt_of(40, salt), GREEDY, SMALL)[1:]

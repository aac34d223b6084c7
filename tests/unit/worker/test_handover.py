"""Hand-offs that are given up, are late, or go wrong: nothing is lost and nothing wrong is used."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from protocol.handoff import KvHandle, TcpOffer
from tests.unit.worker.engine_world import (
    GREEDY,
    PATIENCE_S,
    SMALL,
    HeldTransfer,
    World,
    expected_of,
    prompt_of,
    running,
)
from worker.engine.base import PrefillResult
from worker.transfer.shm import ShmTransfer
from worker.transfer.tcp import TcpTransfer


@dataclass
class Pair:
    """A source, and a target whose transfers end when the test says so."""

    p: World
    d: World
    transfer: HeldTransfer

    async def prefill(self, num_tokens: int = 14, salt: int = 0) -> PrefillResult:
        result = (await self.p.over(self.p.prefill(prompt_of(num_tokens, salt)))).prefilled
        assert result is not None
        return result

    async def held(self) -> None:
        """Until an operation has ended and is held."""
        async with asyncio.timeout(PATIENCE_S):
            await self.transfer.arrived.wait()
        self.transfer.arrived.clear()

    async def turns(self) -> None:
        """Until the target's thread has taken all that it was told so far."""
        key = self.d.decode([])
        await self.d.over(key)


@asynccontextmanager
async def paired(**settings: Any) -> AsyncIterator[Pair]:
    transfer = HeldTransfer(ShmTransfer())
    async with (
        running(worker="p") as p,
        running(transfers=[transfer], worker="d", **settings) as d,
    ):
        yield Pair(p, d, transfer)


def handle_of(result: PrefillResult) -> KvHandle:
    assert result.handle is not None
    return result.handle


def first_ids(result: PrefillResult) -> list[int]:
    assert result.first is not None
    return result.first.ids


@pytest.mark.parametrize("num_ended", [0, 1], ids=["while pulling", "while checking"])
async def test_cancel_of_a_pull_fences_its_blocks_until_the_operation_ends(num_ended: int) -> None:
    async with paired() as pair:
        result = await pair.prefill()
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=first_ids(result))
        await pair.held()
        for _ in range(num_ended):
            pair.transfer.let_one_go()
            await pair.held()
        pair.d.stepper.cancel(key)
        await pair.turns()
        load = pair.d.stepper.load()
        assert (load.running, load.quarantined_blocks, load.free_blocks) == (0, 4, 60)
        pair.transfer.let_one_go()
        await pair.turns()
        assert pair.d.is_clean()
        assert pair.d.stepper.stats().transfers == {("shm", "abandoned"): 1}
        assert pair.d.recorder.of(key).decoding is None
        pair.p.stepper.release([handle_of(result).handle_id])


async def test_lease_that_ends_during_the_pull_is_lost_and_the_blocks_come_back() -> None:
    async with paired() as pair:
        result = await pair.prefill()
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=first_ids(result))
        await pair.held()
        pair.p.stepper.release([handle_of(result).handle_id])
        await pair.p.idle()
        pair.transfer.let_one_go()
        await pair.held()
        pair.transfer.let_one_go()
        failed = (await pair.d.over(key)).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "lease_lost")
        assert pair.d.stepper.stats().transfers == {("shm", "lease_lost"): 1}


async def test_silent_pull_is_given_up_and_the_choice_can_go_on_without_it() -> None:
    async with paired(transfer_timeout_s=60.0) as pair:
        result = await pair.prefill()
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=first_ids(result))
        await pair.held()
        await pair.turns()
        pair.d.clock.ahead_s += 61.0
        pair.d.stepper.renew([])
        await pair.turns()
        pair.d.clock.ahead_s += 61.0
        pair.d.stepper.renew([])
        failed = (await pair.d.over(key)).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "transfer_failed")
        again = pair.d.decode(prompt_of(14), output_ids=first_ids(result), chars_sent=1)
        assert (await pair.d.over(again)).ids == expected_of(prompt_of(14), GREEDY, SMALL)[1:]
        assert pair.d.stepper.load().quarantined_blocks == 4
        pair.transfer.let_one_go()
        await pair.turns()
        assert pair.d.is_clean()
        pair.p.stepper.release([handle_of(result).handle_id])


async def test_too_much_in_quarantine_is_unhealthy_and_takes_no_work() -> None:
    async with paired(max_quarantined_blocks=5) as pair:
        pair.d.healthy = False
        results = [await pair.prefill(salt=salt) for salt in range(2)]
        for salt, result in enumerate(results):
            key = pair.d.decode(
                prompt_of(14, salt), handle=result.handle, output_ids=first_ids(result)
            )
            await pair.held()
            pair.d.stepper.cancel(key)
        await pair.d.recorder.until(lambda: pair.d.recorder.reasons)
        assert "quarantine" in pair.d.recorder.reasons[0]
        failed = (await pair.d.over(pair.d.decode(prompt_of(3)))).failed
        assert failed is not None
        assert failed.code == "engine"
        pair.transfer.let_one_go()
        pair.transfer.let_one_go()
        for result in results:
            pair.p.stepper.release([handle_of(result).handle_id])


async def test_waiting_pull_is_cancelled_without_a_trace() -> None:
    async with paired(max_tokens_in_flight=14) as pair:
        results = [await pair.prefill(salt=salt) for salt in range(2)]
        keys = []
        for salt, result in enumerate(results):
            keys.append(
                pair.d.decode(
                    prompt_of(14, salt), handle=result.handle, output_ids=first_ids(result)
                )
            )
        await pair.held()
        await pair.turns()
        assert pair.d.stepper.load().running == 2
        pair.d.stepper.cancel(keys[1])
        await pair.turns()
        assert (pair.d.stepper.load().free_blocks, pair.transfer.num_live()) == (60, 1)
        pair.transfer.let_one_go()
        await pair.held()
        pair.transfer.let_one_go()
        attempt = await pair.d.over(keys[0])
        assert attempt.ids == expected_of(prompt_of(14), GREEDY, SMALL)[1:]
        for result in results:
            pair.p.stepper.release([handle_of(result).handle_id])


async def test_pull_that_waits_for_room_is_told_of() -> None:
    """Or its router takes it for forgotten, and tries the next full worker."""
    async with paired(max_tokens_in_flight=14) as pair:
        results = [await pair.prefill(salt=salt) for salt in range(2)]
        keys = [
            pair.d.decode(prompt_of(14, salt), handle=result.handle, output_ids=first_ids(result))
            for salt, result in enumerate(results)
        ]
        await pair.held()
        for number in (1, 2):
            pair.d.clock.ahead_s += 1.0
            await pair.turns()
            told = pair.d.recorder.of(keys[1]).progress
            assert told == [("transfer", 0, 0)] * number
        for _ in range(4):
            while pair.transfer.num_held == 0:
                await pair.held()
            pair.transfer.let_one_go()
        for key, result in zip(keys, results, strict=True):
            await pair.d.over(key)
            pair.p.stepper.release([handle_of(result).handle_id])


async def test_only_tokens_that_are_copied_count_as_in_flight() -> None:
    async with paired(max_tokens_in_flight=16) as pair:
        await pair.d.over(pair.d.decode(prompt_of(14, salt=1)))
        results = [await pair.prefill(salt=salt) for salt in range(2)]
        keys = [
            pair.d.decode(prompt_of(14, salt), handle=result.handle, output_ids=first_ids(result))
            for salt, result in enumerate(results)
        ]
        await pair.turns()
        async with asyncio.timeout(PATIENCE_S):
            while pair.transfer.num_held < 2:
                await pair.held()
        for key in keys:
            pair.d.stepper.cancel(key)
        for result in results:
            pair.transfer.let_one_go()
            pair.p.stepper.release([handle_of(result).handle_id])
        await pair.turns()


async def test_crashed_step_fences_the_running_pulls() -> None:
    async with paired() as pair:
        pair.d.healthy = False
        result = await pair.prefill()
        key = pair.d.decode(prompt_of(14), handle=result.handle, output_ids=first_ids(result))
        await pair.held()
        pair.d.runner.crash = RuntimeError("lost device")
        await pair.d.over(pair.d.decode(prompt_of(3)))
        failed = (await pair.d.over(key)).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "engine")
        assert pair.d.stepper.load().quarantined_blocks == 4
        pair.transfer.let_one_go()
        pair.p.stepper.release([handle_of(result).handle_id])
        await pair.turns()
        assert pair.d.is_clean()


async def test_giving_up_on_a_frozen_source_gives_the_blocks_back_at_once() -> None:
    """It holds the connection and sends nothing; closing our end is what ends the pull."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        tcp = TcpTransfer(host="127.0.0.1")
        async with running(worker="p") as p, running(transfers=[tcp], worker="d") as d:
            lent = p.prefill(prompt_of(14))
            result = (await p.over(lent)).prefilled
            assert result is not None
            handle = handle_of(result)
            offer = TcpOffer("127.0.0.1", frozen.getsockname()[1])
            ranks = [msgspec.structs.replace(handle.ranks[0], offers=[offer])]
            key = d.decode(
                prompt_of(14),
                handle=msgspec.structs.replace(handle, ranks=ranks),
                output_ids=first_ids(result),
            )
            connection, _ = await asyncio.to_thread(frozen.accept)
            with connection:
                d.stepper.cancel(key)
                await d.idle()
                async with asyncio.timeout(PATIENCE_S):
                    while not d.is_clean():
                        await d.over(d.decode([]))
            p.stepper.cancel(lent)


async def test_dead_source_fails_the_pull() -> None:
    async with running(transfers=[TcpTransfer(host="127.0.0.1")], worker="d") as d:
        async with running(transfers=[TcpTransfer(host="127.0.0.1")], worker="p") as p:
            key = p.prefill(prompt_of(14))
            result = (await p.over(key)).prefilled
            assert result is not None
            p.stepper.cancel(key)
        failed = (
            await d.over(d.decode(prompt_of(14), handle=result.handle, output_ids=[97]))
        ).failed
        assert failed is not None
        assert (failed.leg, failed.code) == ("transfer", "transfer_failed")


async def test_stop_says_that_a_transfer_is_live_and_leaves_the_memory_alone() -> None:
    transfer = HeldTransfer(ShmTransfer())
    async with running(worker="p") as p:
        lent = p.prefill(prompt_of(14))
        result = (await p.over(lent)).prefilled
        assert result is not None
        async with running(transfers=[transfer], worker="d") as d:
            key = d.decode(prompt_of(14), handle=result.handle, output_ids=first_ids(result))
            async with asyncio.timeout(PATIENCE_S):
                await transfer.arrived.wait()
            d.stepper.cancel(key)
            d.terminal = d.leaves_nothing = False
        assert d.arena.fd >= 0
        d.arena.close()
        d.leases.close()
        p.stepper.cancel(lent)


async def test_many_cancels_at_random_moments_leave_nothing() -> None:
    config = replace(SMALL, num_blocks=40)
    async with running(config, worker="p") as p, running(config, worker="d") as d:
        for round_number in range(12):
            prompt = prompt_of(5 + round_number, salt=round_number)
            lent = p.prefill(prompt)
            result = (await p.over(lent)).prefilled
            assert result is not None
            keys = [
                d.decode(prompt, handle=result.handle, output_ids=first_ids(result))
                for _ in range(4)
            ]
            for number in range(round_number):
                wait_for = keys[number % 4]
                await d.recorder.until(
                    lambda key=wait_for, least=number: (  # type: ignore[misc]
                        d.recorder.of(key).over or len(d.recorder.of(key).deltas) > least
                    )
                )
            for key in keys:
                d.stepper.cancel(key)
            p.stepper.cancel(lent)
            await d.idle()
            await p.idle()
            assert p.is_clean()
        await d.recorder.until(d.is_clean)

"""What other threads read of the engine while the loop changes it, and jobs that end by a panic."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.handoff import KvHandle
from protocol.ids import JobKey
from protocol.sampling import Sampling
from tests.unit.worker.vllm.vllm_world import Heard
from worker.engine.base import DecodeJob
from worker.engine.vllm import engine as engine_module
from worker.engine.vllm.engine import VllmConfig, VllmEngine
from worker.engine.vllm.facts import Metrics
from worker.engine.vllm.handles import LentHandles
from worker.engine.vllm.watch import Verdict

METRICS = Metrics(
    running=0,
    waiting=0,
    kv_usage=0.5,
    iterations=0,
    started_at=0.0,
    num_blocks=1000,
    block_size=16,
    cache_dtype="auto",
    has_connector=True,
)


class PanicException(BaseException):
    """As Rust's come."""


def made(clock: Any = time.monotonic) -> tuple[VllmEngine, Heard]:
    """As after a start, but with no vLLM."""
    engine = VllmEngine(
        VllmConfig(url="http://x", worker="w", incarnation="i"),
        clock=clock,
        wall_clock=time.time,
        new_id=lambda: "h",
    )
    heard = Heard()
    engine._outlet = heard
    engine._lent = LentHandles(lease_s=10.0, block_size=16)
    fakes: dict[str, Any] = {
        "_watch": SimpleNamespace(metrics=METRICS, is_silent=False, steps=0, silent_s=0.0),
        "_index": [],
        "_limits": None,
        "_tokenizer": None,
    }
    for name, fake in fakes.items():
        setattr(engine, name, fake)
    return engine, heard


def job(number: int) -> DecodeJob:
    return DecodeJob(JobKey("r", number), f"req/{number}", [1], Sampling(max_tokens=4))


def lend(engine: VllmEngine, handle_id: str, now: float) -> None:
    handle: KvHandle = SimpleNamespace(handle_id=handle_id, num_tokens=40)  # type: ignore[assignment]
    engine._lent.lend(handle, now)


async def test_a_look_at_the_load_changes_nothing() -> None:
    """A scrape comes in a thread of its own, in the middle of anything."""
    now = 0.0
    engine, _ = made(lambda: now)
    lend(engine, "h1", now)
    assert engine.load().lent_blocks == 3
    now = 100.0
    load = await asyncio.to_thread(engine.load)
    assert (load.lent_blocks, len(engine._lent)) == (3, 1)
    engine._on_verdict(Verdict())
    assert (engine.load().lent_blocks, len(engine._lent)) == (0, 0)
    assert engine.stats().leases_ended == {"released": 0, "expired": 1}


async def test_the_load_can_be_read_while_jobs_come_and_go() -> None:
    engine, _ = made()

    class Entry:
        """Where it is read, the loop has its turn."""

        job = job(1)

        @property
        def is_decoding(self) -> bool:
            engine._jobs[JobKey("r", len(engine._jobs) + 10)] = self  # type: ignore[assignment]
            return True

    engine._jobs[JobKey("r", 1)] = Entry()  # type: ignore[assignment]
    assert engine.load().running == 1
    assert engine.load().running == 2
    engine._jobs.clear()


async def test_numbers_once_given_do_not_change() -> None:
    engine, _ = made()
    engine._count("ok")
    stats = engine.stats()
    reading = iter(stats.transfers.items())
    engine._count("failed")
    assert list(reading) == [(("vllm", "ok"), 1)]
    engine._stats.decoded_tokens += 5
    assert (stats.decoded_tokens, engine.stats().decoded_tokens) == (0, 5)
    assert engine.stats().transfers == {("vllm", "ok"): 1, ("vllm", "failed"): 1}


def test_blocks_of_a_handle_lent_twice_count_once() -> None:
    engine, _ = made()
    for now in (0.0, 1.0):
        lend(engine, "h1", now)
    lend(engine, "h2", 2.0)
    assert engine._lent.num_blocks == 6
    engine._lent.release(["h1", "h1"])
    assert engine._lent.num_blocks == 3
    engine._lent.expire(20.0)
    assert engine._lent.num_blocks == 0


async def test_a_panic_ends_its_job_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, heard = made()

    def panic(*_: object, **__: object) -> None:
        raise PanicException("a bug of the library's own")

    monkeypatch.setattr(engine_module, "build_sequence", panic)
    for number in (1, 2):
        engine.submit(job(number))
    await heard.until(lambda: len(heard.errors) == 2, timeout_s=2.0)
    assert engine.load().waiting == 0
    assert {error.code for error in heard.errors.values()} == {"engine"}
    assert "PanicException" in heard.errors[JobKey("r", 1)].message


async def test_a_cancelled_leg_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, heard = made()

    async def wait(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "_run_leg", wait)
    engine.submit(job(1))
    await asyncio.sleep(0)
    [leg] = engine._legs
    leg.cancel()
    await asyncio.wait([leg])
    assert leg.cancelled()
    assert heard.errors == {}

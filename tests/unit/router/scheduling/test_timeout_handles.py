"""Handles of engines that cannot be told to release or to renew: good once, and early only."""

from typing import TypeVar

import pytest

from protocol.out import FailureCode
from protocol.worker_info import EngineTraits
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from tests.unit.router.scheduling.bench import Bench, failed, handle, info, report, submitted

TRAITS = EngineTraits(first_token="recomputed", release="timeout")


Kind = TypeVar("Kind")


def of_kind(out: list[cmd.Command], kind: type[Kind]) -> list[Kind]:
    return [command for command in out if isinstance(command, kind)]


def pulls(out: list[cmd.Command]) -> list[cmd.StartDecode]:
    return [start for start in of_kind(out, cmd.StartDecode) if start.handle is not None]


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    names = [("p", "prefill"), ("d1", "decode"), ("d2", "decode")]
    bench.list_workers(*(info(name, role, traits=TRAITS) for name, role in names))  # type: ignore[arg-type]
    return bench


def to_pull(bench: Bench) -> cmd.StartDecode:
    bench.feed(submitted())
    [pull] = pulls(bench.feed(ev.Prefilled(1, handle("p"), ended=False)))
    return pull


@pytest.mark.parametrize("code", ["transfer_failed", "engine", "lease_lost", "aborted"])
def test_a_second_decode_worker_never_gets_the_same_handle(bench: Bench, code: FailureCode) -> None:
    pull = to_pull(bench)
    out = bench.feed(failed(pull.attempt, code))
    assert of_kind(out, cmd.ReleaseHandle) == [cmd.ReleaseHandle("p", "p-1", "h1")]
    assert not pulls(out)
    assert len(of_kind(out, cmd.StartPrefill)) == 1


def test_nor_does_one_after_the_first_fell_silent(bench: Bench) -> None:
    pull = to_pull(bench)
    out = bench.pass_time(1.5, pull.worker)
    assert not pulls(out)
    assert len(of_kind(out, cmd.StartPrefill)) == 1


def test_a_refusal_costs_a_prefill_too(bench: Bench) -> None:
    pull = to_pull(bench)
    assert not pulls(bench.feed(ev.Refused(pull.attempt, "full")))


@pytest.mark.parametrize(("waited_s", "is_used"), [(14.0, True), (15.5, False)])
def test_a_handle_that_waited_for_half_its_lease_is_not_used(
    bench: Bench, waited_s: float, is_used: bool
) -> None:
    bench.feed(submitted())
    for name in ("d1", "d2"):
        bench.feed(ev.WorkerLeaving(name, f"{name}-1"))
    assert not pulls(bench.feed(ev.Prefilled(1, handle("p"), ended=False)))
    bench.pass_time(waited_s)
    newcomer = info("d3", "decode", traits=TRAITS)
    bench.feed(ev.WorkerListed(newcomer))
    out = bench.feed(ev.WorkerReported("d3", "d3-1", report()))
    assert len(pulls(out)) == is_used
    assert len(of_kind(out, cmd.StartPrefill)) == (not is_used)

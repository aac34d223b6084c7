"""Workers are killed and frozen under running streams: every stream ends whole and exact, and
nothing is left behind."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.fleet import Fleet
from tests.e2e.streams import (
    asks,
    check_exact,
    start_streams,
    until_ended,
    until_flowing,
)

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(120)]

LEASE_S = 3.0
SETTINGS = (
    "worker.sim_step_ms=20",
    f"worker.lease_ms={LEASE_S * 1000:.0f}",
    "worker.kv_transfer_timeout_ms=2000",
    "worker.sim_prefill_tokens_per_s=4000",
    "worker.max_step_tokens=256",
    "worker.sim_transfer_bytes_per_s=200000",
    "router.kv_transfer_timeout_ms=3000",
    "router.stall_timeout_ms=4000",
)
WORKERS = {"prefill-0", "prefill-1", "decode-0", "decode-1"}
EVERYBODY = {"nats", "etcd", "router"} | WORKERS
HEAL_S = 6.0
"""Less than the lease of a dead worker's key."""
MARGIN_S = 2.0
"""Reports come twice a second."""


@pytest.fixture(scope="module")
def two_and_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Over tcp, where a source that is gone shows."""
    folder = tmp_path_factory.mktemp("faulty")
    flags = ["--transfer=tcp"]
    with Fleet(folder, prefill=2, decode=2, settings=SETTINGS, flags=flags) as fleet:
        yield fleet


@pytest.fixture
def faulty(two_and_two: Fleet) -> Iterator[Fleet]:
    """What was lost is mended at once, as a successor under the old name does not wait for the old
    lease to end; and nothing else is gone."""
    yield two_and_two
    began = time.monotonic()
    two_and_two.mend(*WORKERS)
    assert time.monotonic() - began < HEAL_S
    assert two_and_two.alive() == EVERYBODY


def until_clean(fleet: Fleet) -> None:
    """Within one lease nothing is left of anything."""
    fleet.until_idle(timeout_s=LEASE_S + MARGIN_S)
    for worker in fleet.cluster_info()["workers"]:
        if worker["live"]:
            load = worker["load"]
            assert load["free_blocks"] == load["num_blocks"], worker


def lose(fleet: Fleet, name: str, number: signal.Signals) -> None:
    """SIGKILL or SIGSTOP, for good; nobody else shall go."""
    assert fleet.alive() == EVERYBODY
    if number == signal.SIGKILL:
        fleet.kill(name)
    else:
        os.kill(fleet.process(name).pid, number)


def notes(fleet: Fleet, kind: str) -> float:
    return fleet.metric("baton_events_total", kind=kind)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_worker_that_is_killed_or_frozen_for_good_costs_no_stream(
    faulty: Fleet, victim: str, number: signal.Signals
) -> None:
    resumed = notes(faulty, "resume")
    running = start_streams(faulty, asks(8, 150, kind=f"{number} {victim}"))
    until_flowing(running)
    lose(faulty, victim, number)
    during = start_streams(faulty, asks(8, 30, kind="during"))
    check_exact(during)
    check_exact(running)
    until_clean(faulty)
    assert not faulty.worker(victim).get("eligible")
    if victim == "decode-0":
        assert notes(faulty, "resume") > resumed
    assert max(stream.worst_gap for stream in running) < 5.0


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_worker_that_thaws_after_six_seconds_is_one_of_the_fleet_again(
    faulty: Fleet, victim: str
) -> None:
    running = start_streams(faulty, asks(8, 150, kind=f"thaw {victim}"))
    until_flowing(running)
    incarnation = faulty.worker(victim)["incarnation"]
    with faulty.frozen(victim):
        thaw_at = time.monotonic() + 6.0
        during = start_streams(faulty, asks(8, 30, kind="during"))
        until_ended(during)
        faulty.until(lambda: time.monotonic() > thaw_at, what="the thaw")
    check_exact(during)
    check_exact(running)
    faulty.until(lambda: victim in faulty.eligible(), what=f"{victim} to be eligible again")
    assert faulty.worker(victim)["incarnation"] == incarnation
    until_clean(faulty)
    assert faulty.alive() == EVERYBODY
    check_exact(start_streams(faulty, asks(8, 30, kind="after")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefill_worker_is_lost_in_the_middle_of_a_long_prefill(
    faulty: Fleet, number: signal.Signals
) -> None:
    """Nobody has seen a token yet: another prefills it, and the client sees nothing but time."""
    # 1.5 s of prefill each, so both prefill workers have one.
    running = start_streams(faulty, asks(2, 20, kind=f"long {number}", prompt=6_000))
    faulty.until(
        lambda: all(load(faulty, name)["running"] for name in ("prefill-0", "prefill-1")),
        what="prefills on both workers",
    )
    lose(faulty, "prefill-0", number)
    assert not any(stream.text for stream in running), "the prefill was too short"
    check_exact(running)
    until_clean(faulty)


@pytest.mark.parametrize(
    ("victim", "number"),
    [("prefill", signal.SIGKILL), ("prefill", signal.SIGSTOP), ("decode", signal.SIGKILL)],
)
def test_either_end_of_a_transfer_is_lost_during_it(
    faulty: Fleet, victim: str, number: signal.Signals
) -> None:
    """256 kB at 200 kB/s: the pull lasts more than a second."""
    pulls = faulty.metric("baton_kv_transfers_total")
    ask = asks(1, 40, kind=f"pull {victim} {number}", prompt=4_000)
    running = start_streams(faulty, ask)
    faulty.until(lambda: running[0].text, what="the first token, which comes from the prefill")
    name = next(n for n in sorted(EVERYBODY) if victim in n and faulty.worker(n)["reservations"])
    assert faulty.metric("baton_kv_transfers_total") == pulls, "the pull was too short"
    lose(faulty, name, number)
    check_exact(running)
    until_clean(faulty)


def load(fleet: Fleet, name: str) -> dict[str, int]:
    reported: dict[str, int] = fleet.worker(name)["load"]
    return reported


def test_the_only_prefill_worker_dies(faulty: Fleet) -> None:
    """Decode workers prefill for themselves, and say so."""
    faulty.kill("prefill-1")
    running = start_streams(faulty, asks(8, 60, kind="last prefill"))
    until_flowing(running)
    faulty.kill("prefill-0")
    before = notes(faulty, "local_prefill")
    during = start_streams(faulty, asks(8, 20, kind="no prefill worker"))
    check_exact(during)
    check_exact(running)
    faulty.until(lambda: not prefills(faulty), what="silence of the prefill workers")
    check_exact(start_streams(faulty, asks(8, 20, kind="local prefill")))
    assert notes(faulty, "local_prefill") >= before + 8
    until_clean(faulty)


def prefills(fleet: Fleet) -> list[str]:
    return [name for name in fleet.eligible() if name.startswith("prefill")]


def test_the_only_decode_worker_dies_and_comes_back(faulty: Fleet) -> None:
    """Running streams wait for it and go on; a restart under the same name takes over at once."""
    faulty.kill("decode-1")
    faulty.until(lambda: "decode-1" not in faulty.eligible(), what="decode-1 to be missed")
    running = start_streams(faulty, asks(8, 100, kind="last decode"))
    until_flowing(running)
    faulty.kill("decode-0")
    faulty.until(lambda: "decode-0" not in faulty.eligible(), what="decode-0 to be missed")
    waiting = start_streams(faulty, asks(4, 20, kind="wait for decode"))
    faulty.mend("decode-0", "decode-1")
    check_exact(running)
    check_exact(waiting)
    until_clean(faulty)

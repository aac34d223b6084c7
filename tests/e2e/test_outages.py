"""NATS and etcd are killed, frozen and emptied under running streams: no stream is lost or inexact,
no process leaves, and the fleet finds itself again."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.etcd_server import binary
from tests.e2e.fleet import Fleet
from tests.e2e.streams import (
    asks,
    check_exact,
    completion,
    start_streams,
    until_ended,
    until_flowing,
)

pytestmark = [pytest.mark.xdist_group("outages"), pytest.mark.timeout(120)]

SETTINGS = ("worker.sim_step_ms=20", "worker.lease_ms=3000")
WORKERS = ["decode-0", "decode-1", "prefill-0", "prefill-1"]
MARGIN_S = 3.0
EVERYBODY = {"nats", "etcd", "router", *WORKERS}


@pytest.fixture(scope="module")
def two_and_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("outages")
    with Fleet(folder, prefill=2, decode=2, settings=SETTINGS) as fleet:
        yield fleet


@pytest.fixture
def faulty(two_and_two: Fleet) -> Iterator[Fleet]:
    """Afterwards, whatever happened: the same processes, all eligible, nothing left, at work."""
    faulty = two_and_two
    incarnations = {w["worker_id"]: w["incarnation"] for w in faulty.cluster_info()["workers"]}
    yield faulty
    assert faulty.alive() == EVERYBODY
    faulty.until(lambda: sorted(faulty.eligible()) == WORKERS, what="all workers to be eligible")
    now = {w["worker_id"]: w["incarnation"] for w in faulty.cluster_info()["workers"]}
    assert now == incarnations
    faulty.until_idle()
    check_exact(start_streams(faulty, asks(8, 10, kind="after")))
    faulty.until_idle()


def until_synced(fleet: Fleet, is_synced: bool) -> None:
    fleet.until(
        lambda: fleet.cluster_info()["discovery_synced"] == is_synced,
        what=f"discovery_synced to be {is_synced}",
    )


def registered(fleet: Fleet) -> int:
    """Keys of workers in etcd."""
    command = [binary("etcdctl"), "--endpoints", fleet.etcd_url, "get", "/baton/", "--prefix"]
    asked = subprocess.run(
        [*command, "--keys-only"], env={**os.environ, "ETCDCTL_API": "3"},
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return sum(line.startswith("/baton/") for line in asked.stdout.splitlines())


def until_registered(fleet: Fleet) -> None:
    fleet.until(lambda: registered(fleet) == len(WORKERS), what="all workers in etcd")


def wait_until(fleet: Fleet, at: float) -> None:
    fleet.until(lambda: time.monotonic() > at, what="the end of the outage", timeout_s=60.0)


def test_nats_is_killed_for_five_seconds(faulty: Fleet) -> None:
    before = faulty.metric("baton_events_total", kind="resume")
    running = start_streams(faulty, asks(8, 150, kind="nats killed"))
    until_flowing(running)
    faulty.kill("nats")
    back_at = time.monotonic() + 5.0
    faulty.until(lambda: not faulty.cluster_info()["bus_up"], what="the router to notice")
    during = start_streams(faulty, asks(8, 20, kind="during"))
    wait_until(faulty, back_at)
    faulty.restart("nats")
    check_exact(running)
    check_exact(during)
    assert faulty.metric("baton_bus_up") == 1
    assert faulty.metric("baton_events_total", kind="resume") == before, "replay is enough"


def test_nats_is_frozen_for_five_seconds(faulty: Fleet) -> None:
    before = faulty.metric("baton_events_total", kind="resume")
    running = start_streams(faulty, asks(8, 150, kind="nats frozen"))
    until_flowing(running)
    with faulty.frozen("nats"):
        back_at = time.monotonic() + 5.0
        during = start_streams(faulty, asks(8, 20, kind="during"))
        wait_until(faulty, back_at)
    check_exact(running)
    check_exact(during)
    assert faulty.metric("baton_events_total", kind="resume") == before, "replay is enough"


def test_the_router_is_frozen_for_four_seconds(faulty: Fleet) -> None:
    """It must not take what it has not read yet for silence."""
    lost = ("silent", "suspected", "resume", "retry")
    before = [faulty.metric("baton_events_total", kind=kind) for kind in lost]
    pauses = faulty.metric("baton_events_total", kind="paused")
    running = start_streams(faulty, asks(8, 300, kind="router frozen"))
    until_flowing(running)
    with faulty.frozen("router"):
        thaw_at = time.monotonic() + 4.0
        wait_until(faulty, thaw_at)
    during = start_streams(faulty, asks(8, 20, kind="after"))
    check_exact(during)
    check_exact(running)
    assert [faulty.metric("baton_events_total", kind=kind) for kind in lost] == before
    assert faulty.metric("baton_events_total", kind="paused") == pauses + 1


def test_etcd_is_killed_for_thirty_seconds(faulty: Fleet) -> None:
    running = start_streams(faulty, asks(8, 150, kind="etcd killed"))
    until_flowing(running)
    faulty.kill("etcd")
    back_at = time.monotonic() + 30.0
    check_exact(running)
    until_synced(faulty, False)
    while time.monotonic() < back_at:
        check_exact(start_streams(faulty, asks(8, 100, kind="during")))
    assert sorted(faulty.eligible()) == WORKERS
    faulty.restart("etcd")
    until_synced(faulty, True)
    until_registered(faulty)


def test_etcd_is_frozen_for_fifteen_seconds(faulty: Fleet) -> None:
    running = start_streams(faulty, asks(8, 150, kind="etcd frozen"))
    until_flowing(running)
    with faulty.frozen("etcd"):
        back_at = time.monotonic() + 15.0
        check_exact(running)
        until_synced(faulty, False)
        while time.monotonic() < back_at:
            check_exact(start_streams(faulty, asks(8, 100, kind="during")))
        assert sorted(faulty.eligible()) == WORKERS
    until_synced(faulty, True)
    until_registered(faulty)


def test_etcd_loses_all_its_data(faulty: Fleet) -> None:
    """Everybody vanishes from the list and comes back; who reports is not doubted meanwhile."""
    before = second_chances(faulty)
    running = start_streams(faulty, asks(8, 150, kind="etcd emptied"))
    until_flowing(running)
    data = next(
        argument.removeprefix("--data-dir=")
        for argument in faulty.command("etcd")
        if argument.startswith("--data-dir=")
    )
    faulty.kill("etcd")
    shutil.rmtree(Path(data))
    faulty.restart("etcd")
    while registered(faulty) < len(WORKERS):
        check_exact(start_streams(faulty, asks(4, 10, kind="during")))
    check_exact(running)
    until_synced(faulty, True)
    assert second_chances(faulty) == before


def second_chances(fleet: Fleet) -> float:
    kinds = ("replay", "retry", "resume")
    return sum(fleet.metric("baton_events_total", kind=kind) for kind in kinds)


def test_the_only_decode_worker_is_gone(tmp_path: Path) -> None:
    """Everybody is told, with a code and in time; nobody hangs. After that, at once."""
    settings = (
        "worker.sim_step_ms=20",
        "router.queue_timeout_ms=3000",
        "router.decode_wait_timeout_ms=3000",
    )
    with Fleet(tmp_path, settings=settings) as fleet:
        running = start_streams(fleet, asks(4, 200, kind="last decode"))
        until_flowing(running)
        os.kill(fleet.process("decode-0").pid, signal.SIGSTOP)
        during = start_streams(fleet, asks(4, 20, kind="during"))
        until_ended([*running, *during])
        for stream in running:
            assert (stream.status, stream.is_done, stream.finish) == (200, True, "")
            assert stream.error["code"] == "queue_timeout"
            assert stream.ask.expected().startswith(stream.text)
        for stream in during:  # whose prefill was done has its first token and its 200
            assert stream.status in (200, 503)
            assert stream.error["code"] in ("queue_timeout", "decode_wait_timeout")
            assert stream.took_s < 2.5 + 3.0 + MARGIN_S
        fleet.until(lambda: refused(fleet), what="an answer at once", timeout_s=15.0)
        fleet.kill("decode-0")
        fleet.restart("decode-0")
        fleet.until_back("decode-0", timeout_s=6.0)
        check_exact(start_streams(fleet, asks(4, 20, kind="after")))


def test_nats_stays_away(tmp_path: Path) -> None:
    """Who runs is told in time, with a code. When NATS is back, workers stop what nobody wants."""
    settings = ("worker.sim_step_ms=20", "router.outage_timeout_ms=3000")
    with Fleet(tmp_path, settings=settings) as fleet:
        running = start_streams(fleet, asks(4, 2000, kind="nats gone"))
        until_flowing(running)
        fleet.kill("nats")
        until_ended(running)
        for stream in running:
            assert (stream.status, stream.is_done, stream.finish) == (200, True, "")
            assert stream.error["code"] == "outage_timeout"
            assert stream.ask.expected().startswith(stream.text)
        fleet.restart("nats")
        fleet.until(lambda: fleet.cluster_info()["bus_up"], what="the bus", timeout_s=10.0)
        fleet.until(lambda: len(fleet.eligible()) == 2, what="the workers", timeout_s=10.0)
        fleet.until_idle()
        check_exact(start_streams(fleet, asks(4, 20, kind="after")))


def refused(fleet: Fleet) -> bool:
    """`no_decode_worker`, at once."""
    began = time.monotonic()
    status, body = completion(fleet, asks(1, 10, kind="refused")[0])
    took_s = time.monotonic() - began
    assert status == 503, body
    return body["error"]["code"] == "no_decode_worker" and took_s < 0.5

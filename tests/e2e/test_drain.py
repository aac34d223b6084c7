"""SIGTERM: what runs is finished, nothing new is taken, the exit code is 0, and no client sees an
error. A second SIGTERM: at once."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.fleet import Fleet, is_alive
from tests.e2e.streams import (
    Stream,
    asks,
    check_exact,
    start_streams,
    until_ended,
    until_flowing,
)

pytestmark = [pytest.mark.xdist_group("drain"), pytest.mark.timeout(60)]

WORKERS = ("decode-0", "decode-1", "prefill-0", "prefill-1")
SETTINGS = (
    "worker.sim_step_ms=20",
    "worker.lease_ms=3000",
    "worker.sim_transfer_bytes_per_s=150000",
)


@pytest.fixture(scope="module")
def two_and_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("drained"), prefill=2, decode=2, settings=SETTINGS) as fleet:
        yield fleet


@pytest.fixture
def drained(two_and_two: Fleet) -> Iterator[Fleet]:
    """Whole afterwards, also when a test failed half way: with successors under the old names."""
    yield two_and_two
    two_and_two.mend(*WORKERS)
    two_and_two.until_idle()


def second_chances(fleet: Fleet) -> float:
    return sum(fleet.metric("baton_events_total", kind=kind) for kind in ("retry", "resume"))


def test_a_decode_worker_finishes_its_streams_and_leaves(drained: Fleet) -> None:
    before = second_chances(drained)
    running = start_streams(drained, asks(8, 150, kind="drain decode"))
    until_flowing(running)
    held = drained.worker("decode-0")["reservations"]
    assert held > 0
    drained.terminate("decode-0")
    drained.until(lambda: "decode-0" not in drained.eligible(), what="decode-0 to be spared")
    during = start_streams(drained, asks(8, 20, kind="during"))
    for stream in during:
        assert stream.flowing.wait(5.0)
    assert drained.worker("decode-0")["reservations"] <= held
    assert drained.until_ended("decode-0") == 0
    check_exact(running)
    check_exact(during)
    assert second_chances(drained) == before, "nothing had to move"
    drained.until(lambda: not drained.worker("decode-0"), what="its key to be gone")


def test_a_prefill_worker_waits_until_its_blocks_are_back(drained: Fleet) -> None:
    """512 kB at 150 kB/s: they are lent for more than three seconds, and leaving takes one."""
    before = second_chances(drained)
    running = start_streams(drained, asks(1, 40, kind="drain prefill", prompt=8_000))
    drained.until(lambda: running[0].text, what="the first token, which comes from the prefill")
    names = ("prefill-0", "prefill-1")
    name = next(name for name in names if drained.worker(name)["reservations"])
    drained.terminate(name)
    drained.until(lambda: name not in drained.eligible(), what=f"{name} to be spared")
    assert len(running[0].text) == 1, "the pull was too short"
    pid = drained.process(name).pid

    def pulled() -> bool:
        stays = is_alive(pid)  # asked first: it may leave as soon as the pull is over
        is_over = len(running[0].text) > 1
        assert stays or is_over, "it left while its blocks were lent"
        return is_over

    during = start_streams(drained, asks(4, 20, kind="during"))
    drained.until(pulled, what="the end of the pull")
    check_exact(running)
    check_exact(during)
    assert drained.until_ended(name) == 0
    assert second_chances(drained) == before, "nothing had to move"


def test_a_router_finishes_its_streams_and_refuses_new_ones_after_a_grace(drained: Fleet) -> None:
    """A balancer has to see that it is not ready, before it sends no more."""
    router = drained.add_router("second", "--idle-grace-ms=1500")
    running = start_streams(drained, asks(8, 200, kind="drain router"), port=router.port)
    until_flowing(running)
    drained.terminate("second")
    drained.until(lambda: drained.get("/ready", router.port)[0] == 503, what="it to be unready")
    late = start_streams(drained, asks(4, 20, kind="late"), port=router.port)

    def refusal() -> Stream | None:
        [one] = start_streams(drained, asks(1, 1, kind="refused"), port=router.port)
        return one if one.ended().status != 200 else None

    refused = drained.until(refusal, what="a refusal")
    assert (refused.status, refused.error.get("code")) == (503, "shutting_down")
    check_exact(late)
    check_exact(running)
    assert drained.until_ended("second") == 0
    assert drained.stop_extra("second") == 0
    drained.until_idle()


def test_a_second_signal_ends_a_worker_at_once_and_its_streams_go_on_elsewhere(
    drained: Fleet,
) -> None:
    running = start_streams(drained, asks(8, 200, kind="hurry decode"))
    until_flowing(running)
    assert drained.worker("decode-1")["reservations"]
    drained.terminate("decode-1")
    drained.until(lambda: "decode-1" not in drained.eligible(), what="decode-1 to be spared")
    began = time.monotonic()
    drained.terminate("decode-1")
    assert drained.until_ended("decode-1", timeout_s=5.0) == 0
    assert time.monotonic() - began < 2.0
    check_exact(running)
    assert max(stream.worst_gap for stream in running) < 2.0, "they were told, not missed"


def test_a_router_that_a_balancer_asks_stays_for_the_grace_though_nobody_is_there(
    drained: Fleet,
) -> None:
    """It has no successor, and who has asked whether it is ready sends more until it asks again."""
    router = drained.add_router("probed", "--idle-grace-ms=2000")
    assert drained.get("/ready", router.port)[0] == 200
    began = time.monotonic()
    drained.terminate("probed")
    drained.until(lambda: drained.get("/ready", router.port)[0] == 503, what="it to be unready")
    stream = start_streams(drained, asks(1, 5, kind="late"), port=router.port)
    check_exact(stream)
    assert drained.until_ended("probed", timeout_s=10.0) == 0
    assert time.monotonic() - began >= 2.0
    drained.stop_extra("probed")


def test_a_second_signal_ends_a_router_at_once_and_its_clients_are_told(drained: Fleet) -> None:
    router = drained.add_router("third")
    running = start_streams(drained, asks(8, 200, kind="hurry router"), port=router.port)
    until_flowing(running)
    drained.terminate("third")
    drained.until(lambda: drained.get("/ready", router.port)[0] == 503, what="it to be unready")
    began = time.monotonic()
    os.kill(router.pid, signal.SIGTERM)
    assert drained.until_ended("third", timeout_s=5.0) == 0
    assert time.monotonic() - began < 2.0
    until_ended(running)
    for stream in running:
        assert (stream.error.get("code"), stream.is_done) == ("shutting_down", True), stream.broken
        assert stream.ask.expected().startswith(stream.text)
    drained.stop_extra("third")
    drained.until_idle()  # the workers were told, too

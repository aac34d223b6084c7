"""Everything is restarted, one after the other, and no client sees an error or loses a token.

And what a parent of routers does when something goes wrong: a child that dies, a broken file of
settings, its own death.
"""

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.main import WARM_S
from tests.e2e.fleet import Fleet, Process, environment, is_alive
from tests.e2e.parents import children, said, started
from tests.e2e.rolling_load import under_load
from tests.e2e.streams import (
    Ask,
    Stream,
    asks,
    check_exact,
    completion,
    start_streams,
    until_flowing,
)

pytestmark = [pytest.mark.xdist_group("rolling"), pytest.mark.timeout(90)]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
GRACE_S = 1.0
SETTINGS = (
    "router.processes=2",
    f"router.idle_grace_ms={GRACE_S * 1e3:.0f}",
    "worker.sim_step_ms=10",
    "worker.lease_ms=3000",
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("rolling"), prefill=2, decode=2, settings=SETTINGS) as fleet:
        fleet.until(lambda: num_ready(fleet.process("router")) == 2, what="two routers")
        yield fleet


def num_ready(parent: Process) -> int:
    return said(parent).count("router ready")


def incarnations(fleet: Fleet) -> dict[str, str]:
    return {name: fleet.worker(name)["incarnation"] for name in WORKERS}


def restart_routers(fleet: Fleet, parent: Process) -> None:
    """SIGHUP, until it is done."""
    before = said(parent).count("rolling restart done")
    os.kill(parent.pid, signal.SIGHUP)
    fleet.until(
        lambda: said(parent).count("rolling restart done") > before,
        what="the rolling restart",
        timeout_s=30.0,
    )


def test_every_worker_then_every_router_is_restarted_under_load(fleet: Fleet) -> None:
    parent = fleet.process("router")
    before, old = incarnations(fleet), children(parent)
    with under_load(fleet) as load:
        for name in WORKERS:
            incarnation = fleet.worker(name)["incarnation"]
            fleet.terminate(name)
            assert fleet.until_ended(name) == 0
            fleet.restart(name)
            fleet.until_back(name, incarnation)
        after_workers = dict(load.answered)
        restart_routers(fleet, parent)
    load.check()
    assert all(load.answered[kind] > after_workers[kind] for kind in after_workers)
    assert load.reused > load.answered["http"] / 2, "the clients keep their connections"
    now = incarnations(fleet)
    assert not set(now.values()) & set(before.values())
    assert len(children(parent)) == 2
    assert not set(old) & set(children(parent))
    fleet.until_idle()


def test_a_successor_that_knows_no_workers_relieves_nobody(fleet: Fleet) -> None:
    """etcd is frozen: the old routers have their lists, a new one has none. It waits."""
    parent = fleet.process("router")
    relieved, up = said(parent).count("relieved=True"), said(parent).count("bus up")
    with under_load(fleet) as load:
        with fleet.frozen("etcd"):
            os.kill(parent.pid, signal.SIGHUP)
            fleet.until(lambda: said(parent).count("bus up") > up, what="the successor on the bus")
            end = time.monotonic() + WARM_S + 0.5
            fleet.until(lambda: time.monotonic() > end, what="it could be warm")
            assert said(parent).count("relieved=True") == relieved
        fleet.until(
            lambda: is_done_since(parent, relieved), what="the rolling restart", timeout_s=40.0
        )
    load.check()


def is_done_since(parent: Process, relieved: int) -> bool:
    """A rolling restart is over that began after so many were relieved."""
    text = said(parent)
    return (
        text.count("relieved=True") > relieved
        and "rolling restart done" in text.rpartition("relieved=True")[2]
    )


class Kept:
    """One keep-alive connection to a parent's port, and who answers there."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
        self.router = self.ask()
        self.socket = self.connection.sock

    def ask(self) -> str:
        """The answering router's id."""
        self.connection.request("GET", "/cluster_info")
        self.answer = self.connection.getresponse()
        info = json.loads(self.answer.read())
        assert self.answer.status == 200
        return str(info["router"])

    def is_closed(self, timeout_s: float) -> bool:
        readable, _, _ = select.select([self.socket], [], [], timeout_s)
        return bool(readable) and not self.socket.recv(1)


def test_a_relieved_router_serves_its_connections_and_accepts_no_others(fleet: Fleet) -> None:
    """The next answer of each is the last one on it; one that is not used is kept for the grace."""
    parent = fleet.process("router")
    kept = [Kept(fleet.port) for _ in range(40)]
    by_router = {name: [k for k in kept if k.router == name] for name in {k.router for k in kept}}
    assert len(by_router) == 2
    assert min(map(len, by_router.values())) >= 2, "shared by both"
    running = start_streams(fleet, asks(8, 200, kind="relieved"))
    until_flowing(running)
    before = said(parent).count("relieved=True")
    os.kill(parent.pid, signal.SIGHUP)
    fleet.until(lambda: said(parent).count("relieved=True") > before, what="one to drain")
    began = time.monotonic()
    [old] = [name for name, ones in by_router.items() if ones[0].ask() == name and leaves(ones[0])]
    idle = by_router[old][1]
    fresh = [Kept(fleet.port) for _ in range(20)]
    assert old not in {k.router for k in fresh}, "it accepts no more"
    ready = fleet.get("/ready")
    assert ready[0] == 200, "the service is ready"
    assert idle.is_closed(10.0)
    assert time.monotonic() - began >= GRACE_S * 0.8, "a request might have been on its way"
    check_exact(running)
    for one in (*kept, *fresh):
        one.connection.close()
    fleet.until(
        lambda: is_done_since(parent, before), what="the rest of the restart", timeout_s=30.0
    )
    fleet.until_idle()


def leaves(kept: Kept) -> bool:
    return kept.answer.headers.get("Connection") == "close"


def test_a_child_that_dies_is_replaced_and_the_other_serves(fleet: Fleet) -> None:
    parent = fleet.process("router")
    victim, other = children(parent)
    running = streams_of_both(fleet, asks(64, 450, kind="dies"))
    check_one_answers_for_all(fleet, [stream.told_id for stream in running])
    os.kill(victim, signal.SIGKILL)
    status, _ = completion(fleet, asks(1, 10, kind="after")[0])
    assert status == 200
    for stream in running:
        stream.ended()
    whole = [stream for stream in running if not stream.problem()]
    assert 0 < len(whole) < len(running), "each router had some"
    fleet.until(lambda: len(children(parent)) == 2, what="another one")
    assert other in children(parent)
    ready = num_ready(parent)
    fleet.until(lambda: num_ready(parent) > ready or is_warm(parent), what="it to serve")
    assert "ended by itself with -9" in said(parent)
    fleet.until_idle(timeout_s=20.0)


def streams_of_both(fleet: Fleet, wanted: Sequence[Ask]) -> list[Stream]:
    """16 streams; more if none of them came to one of the two routers: whoever wakes up first takes
    what waits at the socket."""
    running: list[Stream] = []
    for at in range(0, len(wanted), 16):
        running += start_streams(fleet, wanted[at : at + 16])
        until_flowing(running)
        info = json.loads(fleet.get("/cluster_info")[1])
        if len(info["routers"]) == 2 and all(one["inflight"] for one in info["routers"]):
            break
    return running


def check_one_answers_for_all(fleet: Fleet, requests: list[str]) -> None:
    """These run, some at each of two routers; whichever is asked knows of all."""
    for _ in range(4):
        info = json.loads(fleet.get("/cluster_info")[1])
        assert info["inflight"] == len(requests)
        assert sorted(one["inflight"] for one in info["routers"])[0] > 0
        assert sum(worker["reservations"] for worker in info["workers"]) == len(requests)
        text = fleet.get("/metrics")[1].decode()
        families = {one.name: one for one in text_string_to_metric_families(text)}
        streams = families["baton_inflight_choices"].samples
        assert sum(sample.value for sample in streams) == len(requests)
        assert {sample.labels["router"] for sample in streams} == {
            one["router"] for one in info["routers"]
        }
        for request in requests[::4]:
            status, body = fleet.get(f"/debug/requests/{request}")
            assert status == 200
            assert json.loads(body)["state"] == "running"
    assert fleet.metric("baton_error_answers_total", code="unknown_request") == 0


def is_warm(parent: Process) -> bool:
    """The child that was started last has said that it is ready."""
    return "router ready" in said(parent).rpartition("router started")[2]


def add_parent(fleet: Fleet, name: str, count: int, *flags: str) -> Process:
    grace = f"--idle-grace-ms={GRACE_S * 1e3:.0f}"
    parent = fleet.add_router(name, f"--processes={count}", grace, *flags)
    fleet.until(lambda: num_ready(parent) == count, what=f"all of {name} to be ready")
    return parent


def test_a_broken_file_leaves_the_old_routers_serving(fleet: Fleet, tmp_path: Path) -> None:
    settings = tmp_path / "router.yaml"
    settings.write_text("max_queue: 100\n")
    parent = add_parent(fleet, "file", 1, f"--config={settings}")
    old = children(parent)
    settings.write_text("max_queues: 100\n")
    os.kill(parent.pid, signal.SIGHUP)
    fleet.until(lambda: "rolling restart given up" in said(parent), what="it to give up")
    assert "unknown key `max_queues`; did you mean `max_queue`?" in said(parent)
    assert children(parent) == old
    check_exact(start_streams(fleet, asks(4, 20, kind="still"), port=parent.port))
    settings.write_text("max_queue: 200\n")
    restart_routers(fleet, parent)
    assert len(children(parent)) == 1
    assert children(parent) != old
    assert fleet.stop_extra("file") == 0


def test_children_of_a_killed_parent_finish_and_leave(fleet: Fleet) -> None:
    parent = add_parent(fleet, "killed", 2)
    mine = children(parent)
    running = start_streams(fleet, asks(8, 100, kind="orphans"), port=parent.port)
    until_flowing(running)
    os.kill(parent.pid, signal.SIGKILL)
    check_exact(running)
    fleet.until(lambda: not any(map(is_alive, mine)), what="the orphans to leave")
    fleet.stop_extra("killed")
    with pytest.raises(ConnectionRefusedError):
        fleet.get("/live", parent.port)


def test_a_stopped_parent_finishes_and_a_second_signal_ends_it_at_once(fleet: Fleet) -> None:
    parent = add_parent(fleet, "stopped", 1)
    running = start_streams(fleet, asks(8, 100, kind="stopped"), port=parent.port)
    until_flowing(running)
    os.kill(parent.pid, signal.SIGTERM)
    check_exact(running)
    assert fleet.wait_extra("stopped") == 0

    parent = add_parent(fleet, "hurried", 2)
    mine = children(parent)
    running = start_streams(fleet, asks(8, 1000, kind="hurried"), port=parent.port)
    until_flowing(running)
    os.kill(parent.pid, signal.SIGTERM)
    fleet.until(lambda: said(parent).count("draining requests") == 2, what="both to drain")
    began = time.monotonic()
    os.kill(parent.pid, signal.SIGTERM)
    assert fleet.wait_extra("hurried") == 0
    assert time.monotonic() - began < 3.0
    assert not any(map(is_alive, mine))
    for stream in running:
        assert stream.ended().error.get("code") == "shutting_down"
    fleet.until_idle()


def test_ctrl_c_on_the_whole_group_drains_once(fleet: Fleet, tmp_path: Path) -> None:
    """On port 0: the parent says which one it is, once."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "baton", "router", "--processes=1", "--port=0"]
    places = [f"--nats={fleet.nats_url}", f"--etcd={fleet.etcd_url}"]
    with log.open("wb") as output:
        started_one = subprocess.Popen(
            [*command, *places],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
    parent = Process("group", "router", started_one.pid, 0, log)
    try:
        fleet.until(lambda: is_warm(parent), what="it to be ready")
        urls = re.findall(r"listening url=http://127\.0\.0\.1:(\d+)", said(parent))
        assert len(urls) == 1
        running = start_streams(fleet, asks(4, 100, kind="ctrl-c"), port=int(urls[0]))
        until_flowing(running)
        os.killpg(started_one.pid, signal.SIGINT)
        check_exact(running)
        assert started_one.wait(10.0) == 0
        assert not any(map(is_alive, started(parent)))
    finally:
        started_one.kill()
        started_one.wait()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--processes=-1"], "processes must be 0 to 128, not -1"),
        (["--processes=two"], "processes: Expected `int`"),
        (["--processes=2", "--host=nowhere.invalid"], "cannot listen on nowhere.invalid:8000"),
        (["--processes=1", "--port=0", "--tls-cert=/none", "--tls-key=/none"], "tls_cert: "),
        (["--listen-fds=77", "--line-fd=78"], "not started by `baton router --processes`"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(flags: list[str], text: str) -> None:
    command = [sys.executable, "-m", "baton", "router", "--log-level=error", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=environment(), check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"baton: {text}"), done.stderr
    assert done.stderr.count("\n") == 1

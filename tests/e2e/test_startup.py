"""Starting and stopping: what an operator did wrong is one clear line, what is not there yet is
waited for, and Ctrl-C leaves nothing behind."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from baton.demo import demo_model_folder
from baton.local_servers import etcd_command, nats_command
from tests.contract.nats_server import free_port
from tests.e2e.fleet import READY_S, environment, is_alive

pytestmark = [pytest.mark.xdist_group("startup"), pytest.mark.timeout(90)]

NOWHERE = ("--nats=nats://127.0.0.1:9", "--etcd=http://127.0.0.1:9")
SIMULATED = ("worker", "--role=both", "--engine=simulated", *NOWHERE)
TORCH = ("worker", "--role=both", *NOWHERE)
ROUTER = ("router", "--port=0", *NOWHERE)
CTRL_C_S = 10.0

T = TypeVar("T")


class Running:
    """A process of ours and what it says."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment()
            )

    def says(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts processes; all that still run are ended afterwards, in the same order."""
    started: list[Running] = []

    def start(name: str, command: Sequence[str]) -> Running:
        started.append(Running(command, tmp_path / f"{name}.log"))
        return started[-1]

    yield start
    for process in started:
        process.end()


def baton(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "baton", *arguments]


def until(condition: Callable[[], T], what: str, timeout_s: float = READY_S) -> T:
    """Ask until the answer is true; other processes cannot wake us."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return answer


# --- what is wrong is said in one line ---


def complaint(arguments: Sequence[str]) -> str:
    """The one line that a process which cannot work says about why."""
    done = subprocess.run(
        baton(*arguments),
        capture_output=True,
        text=True,
        timeout=30.0,
        env=environment(),
        check=False,
    )
    assert done.returncode not in (0, None), done
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("baton")]
    assert len(said) == 1, done.stderr
    assert said == done.stderr.splitlines()[-1:], done.stderr
    return said[0]


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        (ROUTER, "prot: 8001\n", "unknown key `prot`; did you mean `port`?"),
        (SIMULATED, "lease: 3\n", "unknown key `lease`; did you mean `lease_ms`?"),
    ],
)
def test_a_config_file_with_a_mistake(
    tmp_path: Path, command: Sequence[str], text: str, expected: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    said = complaint([command[0], f"--config={path}", *NOWHERE])
    assert expected in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*SIMULATED, "--nats=http://127.0.0.1:4222"), "'http://127.0.0.1:4222' is not nats://"),
        ((*SIMULATED, "--nats-ca=/no/such/file"), "/no/such/file"),
        ((*SIMULATED, "--etcd=ftp://127.0.0.1"), "'ftp://127.0.0.1'"),
        ((*ROUTER, "--nats=nats://127.0.0.1:port"), "'nats://127.0.0.1:port' is not nats://"),
        ((*SIMULATED, *NOWHERE, "--served-model-name=" + "m" * 5000), "no router would believe"),
        (("up", "--engine=simulated", "--model=/no/such/folder"), "/no/such/folder"),
        (("up", "--decode=0"), "at least one worker that decodes"),
    ],
)
def test_a_flag_with_a_mistake(arguments: Sequence[str], expected: str) -> None:
    assert expected in complaint(arguments)


@pytest.mark.parametrize("which", ["router", "metrics", "tcp"])
def test_a_port_that_is_taken(which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = {
            "router": ("router", f"--port={port}", *NOWHERE),
            "metrics": (*SIMULATED, f"--metrics-port={port}"),
            "tcp": (*SIMULATED, "--transfer=tcp", f"--transfer-port={port}"),
        }[which]
        said = complaint(arguments)
    assert str(port) in said
    assert "in use" in said


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", ["no folder", "empty folder", "config.json", "weights"])
def test_a_model_folder_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage == "empty folder":
        folder.mkdir()
    elif damage != "no folder":
        shutil.copytree(demo_model_folder(), folder)
        broken = folder / damage if damage != "weights" else next(folder.glob("*.safetensors"))
        truncate(broken)
    said = complaint([*TORCH, f"--model={folder}"])
    assert str(folder) in said


# --- what is not there yet is waited for ---


def test_servers_that_come_after_the_processes(run: Run, tmp_path: Path) -> None:
    nats_port, etcd_port, port = free_port(), free_port(), free_port()
    servers = (f"--nats=nats://127.0.0.1:{nats_port}", f"--etcd=http://127.0.0.1:{etcd_port}")
    router = run("router", baton("router", f"--port={port}", *servers))
    worker = run("worker", baton("worker", "--role=both", "--engine=simulated", *servers))
    for process in (router, worker):
        until(partial(process.says, f"127.0.0.1:{nats_port}"), "a word about NATS")
    assert get(port, "/live")[0] == 200
    assert get(port, "/ready")[0] == 503
    run("nats", nats_command(nats_port, tmp_path / "nats"))
    until(lambda: worker.says(f"127.0.0.1:{etcd_port}"), "a word about etcd")
    assert (router.process.poll(), worker.process.poll()) == (None, None)
    run("etcd", etcd_command(etcd_port, free_port(), tmp_path / "etcd"))
    until(lambda: get(port, "/ready")[0] == 200, "the worker", timeout_s=10.0)
    until(lambda: router.says("router ready"), "the router to say that it is ready")
    assert worker.says("worker ready")
    assert not router.says("Traceback")
    assert not worker.says("Traceback")


def get(port: int, path: str) -> tuple[int, bytes]:
    """0 while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""


@pytest.mark.parametrize("command", ["router", "worker"])
def test_a_process_that_waits_for_its_servers_can_be_stopped(run: Run, command: str) -> None:
    flags = ("--port=0",) if command == "router" else ("--role=both", "--engine=simulated")
    process = run(command, baton(command, *flags, *NOWHERE))
    until(lambda: process.says("127.0.0.1:9"), "a word about the servers")
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(5.0) == 0
    assert not process.says("Traceback")


# --- baton up ---


def listed(folder: Path) -> dict[str, int]:
    """Names and pids, as far as `baton up` has come."""
    path = folder / "processes.json"
    if not path.exists():
        return {}
    return {entry["name"]: entry["pid"] for entry in json.loads(path.read_text())}


def up(folder: Path, *flags: str) -> list[str]:
    return baton("up", "--engine=simulated", "--port=0", f"--state-dir={folder}", *flags)


@pytest.mark.parametrize("moment", ["servers", "workers", "ready"])
def test_ctrl_c_leaves_nothing_behind(run: Run, tmp_path: Path, moment: str) -> None:
    process = run("up", up(tmp_path))
    if moment == "ready":
        until(lambda: process.says("Baton is up"), "the fleet")
    else:
        name = {"servers": "nats", "workers": "decode-0"}[moment]
        until(lambda: name in listed(tmp_path), "the first children")
    process.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.process.wait(CTRL_C_S)
    assert time.monotonic() - began < CTRL_C_S
    assert not process.says("Traceback")
    left = [name for name, pid in listed(tmp_path).items() if is_alive(pid)]
    assert not left


def test_ctrl_c_also_ends_what_is_frozen_or_has_lost_its_servers(run: Run, tmp_path: Path) -> None:
    process = run("up", up(tmp_path))
    until(lambda: process.says("Baton is up"), "the fleet")
    pids = listed(tmp_path)
    os.kill(pids["decode-0"], signal.SIGSTOP)
    for name in ("nats", "etcd"):
        os.kill(pids[name], signal.SIGKILL)
    until(lambda: process.says("nats (pid"), "the report")
    assert process.says("ended with -9")
    process.process.send_signal(signal.SIGINT)
    process.process.wait(CTRL_C_S)
    assert not any(is_alive(pid) for pid in pids.values())


def test_a_child_that_cannot_start_is_reported_in_one_line(run: Run, tmp_path: Path) -> None:
    process = run("up", up(tmp_path, "--set=decode.block_size=0"))
    assert process.process.wait(READY_S) == 2
    said = process.log.read_text().splitlines()
    assert said[-1] == ("baton: decode-0 ended at start: baton: block_size must be at least 1")
    assert not any(is_alive(pid) for pid in listed(tmp_path).values())

"""A real fleet for tests: `baton up` and everything it starts, as processes on this machine.

    with Fleet(tmp_path, decode=2, settings=["worker.lease_ms=3000"]) as fleet:
        requests to fleet.base_url, faults with os.kill(fleet.process("decode-0").pid, ...)

Whatever was started is gone after `stop`, also when a test failed half way. `conftest.py` adds
`dump_logs()` to the report of a test that failed. Tests that share a fleet are in one file, so
that it is started once under `pytest -n 2 --dist loadfile`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.contract.nats_server import free_port
from tests.e2e.router_view import RouterView

READY_S = 30.0
STOP_S = 20.0
TAIL_CHARS = 6_000
SERVERS = ("nats", "etcd")
"""They leave last: the others say goodbye through them."""
MODEL = "demo"
"""The name under which `baton up` serves when it is not told another."""


@dataclass(frozen=True)
class Process:
    """One started process. `port` is 0 where it listens on none that matters."""

    name: str
    role: str
    pid: int
    port: int
    log: Path


class Fleet(RouterView):
    """`baton up`, and further routers and workers beside it.

    `settings` are `ROLE.NAME=VALUE` strings as for `baton up --set`, `flags` any further flags.
    """

    def __init__(
        self,
        folder: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        both: int = 0,
        engine: str = "simulated",
        settings: Sequence[str] = (),
        flags: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._command = [
            *(sys.executable, "-m", "baton", "up", "--port=0"),
            *(f"--engine={engine}", f"--state-dir={folder}"),
            *(f"--prefill={prefill}", f"--decode={decode}", f"--both={both}"),
            *(f"--set={setting}" for setting in settings),
            *flags,
        ]
        self._engine = engine
        self._up: subprocess.Popen[str] | None = None
        self._said: list[str] = []
        self._is_ready = threading.Event()
        self._reader: threading.Thread | None = None
        self._extra: dict[str, tuple[Process, subprocess.Popen[bytes]]] = {}
        self._killed: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- life ---

    def start(self) -> Self:
        """Until `baton up` says that everything is there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._up = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        self._reader = threading.Thread(target=self._read, args=(self._up,), daemon=True)
        self._reader.start()
        assert self._is_ready.wait(READY_S), f"no fleet after {READY_S} s\n{self.dump_logs()}"
        assert self._up.poll() is None, f"baton up ended\n{self.dump_logs()}"
        return self

    def _read(self, up: "subprocess.Popen[str]") -> None:
        assert up.stdout is not None
        for line in up.stdout:
            self._said.append(line)
            if line.startswith("Baton is up"):
                self._is_ready.set()
        self._is_ready.set()

    def stop(self) -> None:
        """SIGTERM, wait, then kill all that is left. Everything may be frozen, killed or stopped
        already."""
        extra = [process for process, _ in self._extra.values()]
        for process in extra:
            if process.role not in SERVERS and is_alive(process.pid):
                _signal(process.pid, signal.SIGCONT)
                _signal(process.pid, signal.SIGTERM)
        for process in extra:
            if process.role not in SERVERS:
                self.wait_extra(process.name)
        self._stop_up()
        for process in extra:
            if process.role in SERVERS:
                self.stop_extra(process.name)

    def _stop_up(self) -> None:
        up, self._up = self._up, None
        if up is None:
            return
        listed = self.processes
        up.terminate()
        try:
            up.wait(STOP_S)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()
            for process in listed:  # orphans now: nobody else has an eye on their numbers
                if _is_ours(process.pid, self._folder):
                    _signal(process.pid, signal.SIGKILL)
        assert self._reader is not None
        self._reader.join(5.0)
        assert up.stdout is not None
        up.stdout.close()

    # --- who is there ---

    @property
    def processes(self) -> list[Process]:
        """Of `baton up` as its `processes.json` has them, and what was started beside it."""
        path = self._folder / "processes.json"
        listed = json.loads(path.read_text()) if path.exists() else []
        own = [Process(**{**entry, "log": Path(entry["log"])}) for entry in listed]
        return own + [process for process, _ in self._extra.values()]

    def process(self, name: str) -> Process:
        """`router`, `nats`, `etcd`, `prefill-0`, `decode-1`, ...; of two with one name the last
        started."""
        return next(process for process in reversed(self.processes) if process.name == name)

    def by_role(self, role: str) -> list[Process]:
        return [process for process in self.processes if process.role == role]

    @property
    def base_url(self) -> str:
        """Of the router, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self.process("router").port

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self.process('nats').port}"

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self.process('etcd').port}"

    # --- beside `baton up` ---

    def add_router(self, name: str, *flags: str, num_workers: int | None = None) -> Process:
        """Another router on the same bus, ready when it says so, on NATS too, and sees as many
        workers as the first one."""
        wanted = len(self.eligible()) if num_workers is None else num_workers
        before = self._num_ready(name)
        process = self._add(name, "router", [f"--port={(port := free_port())}", *flags], port)
        self.until(lambda: self._num_ready(name) > before, what=f"{name} to be ready")
        self.until(lambda: self._num_seen(port) >= wanted, what=f"{name} to see the workers")
        return process

    def _num_ready(self, name: str) -> int:
        """How often a router of that name has said that it is ready."""
        log = self._log_of(name)
        return log.read_text(errors="replace").count("router ready") if log.exists() else 0

    def _num_seen(self, port: int) -> float:
        """From the metrics, which need no API key; 0 if there is no answer yet."""
        try:
            return self.metric("baton_workers", port, state="eligible")
        except OSError:
            return 0.0

    def add_worker(self, name: str, role: str, *flags: str) -> Process:
        """Another worker, ready when the router thinks it eligible. A name that is in use and
        dead is started anew."""
        process = self._add(name, role, [f"--role={role}", f"--engine={self._engine}", *flags], 0)
        self.until(lambda: name in self.eligible(), what=f"{name} to be eligible")
        return process

    def _add(self, name: str, role: str, flags: Sequence[str], port: int) -> Process:
        command = [
            *(sys.executable, "-m", "baton", "router" if role == "router" else "worker"),
            *(f"--name={name}", f"--nats={self.nats_url}", f"--etcd={self.etcd_url}", *flags),
        ]
        return self._start(name, role, command, port)

    def _start(self, name: str, role: str, command: Sequence[str], port: int) -> Process:
        log = self._log_of(name)
        with log.open("ab") as output:
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
            )
        process = Process(name, role, started.pid, port, log)
        self._extra[name] = (process, started)
        return process

    def _log_of(self, name: str) -> Path:
        """Of what was started beside `baton up`; one for all of the same name."""
        return self._folder / "logs" / f"{name}-added.log"

    def stop_extra(self, name: str, *, timeout_s: float = STOP_S) -> int:
        """End what `add_router` or `add_worker` started; its exit code, negative for a signal."""
        started = self._extra[name][1]
        if started.poll() is None:
            _signal(started.pid, signal.SIGCONT)
            started.terminate()
        return self.wait_extra(name, timeout_s=timeout_s)

    def wait_extra(self, name: str, *, timeout_s: float = STOP_S) -> int:
        """The same for what has been told to end."""
        _, started = self._extra.pop(name)
        try:
            return started.wait(timeout_s)
        except subprocess.TimeoutExpired:
            started.kill()
            return started.wait()

    def dump_logs(self) -> str:
        """The ends of all logs."""
        parts = ["--- baton up ---\n", *self._said[-40:]]
        for process in self.processes:
            text = process.log.read_text(errors="replace") if process.log.exists() else ""
            if text:
                parts.append(f"--- {process.name} (pid {process.pid}) ---\n{text[-TAIL_CHARS:]}")
        return "".join(parts)

    # --- faults ---

    @contextmanager
    def frozen(self, name: str) -> Iterator[Process]:
        """SIGSTOP for the time of the block."""
        process = self.process(name)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            yield process
        finally:
            _signal(process.pid, signal.SIGCONT)

    def kill(self, name: str) -> None:
        """SIGKILL; `baton up` reports it and goes on. `restart` starts it anew."""
        process = self.process(name)
        self._killed[name] = self.command(name)
        os.kill(process.pid, signal.SIGKILL)
        if name in self._extra:
            self._extra[name][1].wait()
        else:
            self.until(lambda: not is_alive(process.pid), what=f"the end of {name}")

    def until_ended(self, name: str, *, timeout_s: float = 15.0) -> int:
        """The exit code of a process that ends by itself or was told to."""
        process = self.process(name)
        if name in self._extra:
            return self._extra[name][1].wait(timeout_s)
        start = f"{name} (pid {process.pid}) ended with "

        def said() -> list[str]:
            return [line for line in self._said if line.startswith(start)]

        lines = self.until(said, what=f"the end of {name}", timeout_s=timeout_s)
        return int(lines[-1].removeprefix(start))

    def command(self, name: str) -> list[str]:
        return command_line(self.process(name).pid)

    def terminate(self, name: str) -> None:
        """SIGTERM. `restart` starts it anew once it has ended."""
        process = self.process(name)
        if name not in self._killed or is_alive(process.pid):
            self._killed[name] = self.command(name)
        os.kill(process.pid, signal.SIGTERM)

    def restart(self, name: str) -> Process:
        """What was ended, with the same command line; does not wait until it serves."""
        old = self.process(name)
        return self._start(name, old.role, self._killed.pop(name), old.port)

    def mend(self, *names: str) -> None:
        """Those that a test has killed, ended, or left frozen are there again, as new processes;
        one that went by itself is not."""
        dead = {name: self.worker(name).get("incarnation", "") for name in names}
        for name in names:
            if is_frozen(self.process(name).pid):
                self.kill(name)
        dead = {name: dead[name] for name in names if not is_alive(self.process(name).pid)}
        lost = [name for name in dead if name in self._killed]
        for name in lost:
            self.restart(name)
        for name in lost:
            self.until_back(name, dead[name])

    def until_back(self, name: str, incarnation: str = "", *, timeout_s: float = 15.0) -> None:
        """Until the router gives that worker work, under another than this incarnation."""

        def is_back() -> bool:
            return any(
                worker["worker_id"] == name and worker["incarnation"] != incarnation
                for worker in self.cluster_info()["workers"]
                if worker["eligible"]
            )

        self.until(is_back, what=f"{name} to be back", timeout_s=timeout_s)

    def worker(self, name: str) -> dict[str, Any]:
        """What the router says of that worker; empty if it knows none of that name."""
        listed = self.cluster_info()["workers"]
        return next((worker for worker in listed if worker["worker_id"] == name), {})

    def alive(self) -> set[str]:
        """Names of the processes that run (or are frozen)."""
        return {process.name for process in self.processes if is_alive(process.pid)}


def environment() -> dict[str, str]:
    """For a started process. Debug mode of asyncio is for the tests' own loops: it makes a router
    ten times slower."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    kept.pop("PYTHONASYNCIODEBUG", None)
    return kept


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def is_alive(pid: int) -> bool:
    """A process of that number exists and is no zombie."""
    return _state(pid) not in ("", "Z")


def is_frozen(pid: int) -> bool:
    return _state(pid) == "T"


def _state(pid: int) -> str:
    """The kernel's letter for it; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _is_ours(pid: int, folder: Path) -> bool:
    """Whether that number still belongs to a process that logs into our folder."""
    try:
        return str(folder.resolve()) in os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return False

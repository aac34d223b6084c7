"""`baton up`: nats-server, etcd, a router and workers on this machine, under one roof.

Every process is a real one with its own pid and log; `processes.json` says which is which, so that
a reader can kill one and watch what happens. Nothing is restarted: what dies is reported.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from baton.local_servers import etcd_command, free_port, nats_command, wait_for_port
from protocol.errors import ConfigError

_log = logging.getLogger("baton.up")

READY_TIMEOUT_S: Final = 120.0
SERVER_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 15.0
_ROLES: Final = ("router", "prefill", "decode", "both", "worker")


@dataclass(frozen=True, slots=True)
class UpOptions:
    model: str
    engine: str
    transfer: str
    host: str
    port: int
    state_dir: Path
    log_level: str
    log_format: str
    counts: dict[str, int]
    settings: tuple[tuple[str, str, str], ...] = ()
    """(role or worker, name, value) triples of `--set`."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> "UpOptions":
        """Raises ConfigError."""
        counts = {"prefill": args.prefill, "decode": args.decode, "both": args.both}
        if any(count < 0 for count in counts.values()) or counts["decode"] + counts["both"] < 1:
            raise ConfigError("at least one worker that decodes is needed (--decode or --both)")
        if args.engine == "torch" and importlib.util.find_spec("torch") is None:
            raise ConfigError(
                "the torch engine needs torch: install baton-serve[torch], or take "
                "--engine simulated"
            )
        if args.model and not Path(args.model).is_dir():
            raise ConfigError(f"--model {args.model}: no such folder")
        state = args.state_dir or tempfile.mkdtemp(prefix="baton-")
        return cls(
            model=args.model,
            engine=args.engine,
            transfer=args.transfer,
            host=args.host,
            port=args.port or free_port(),
            state_dir=Path(state).resolve(),
            log_level=args.log_level,
            log_format=args.log_format,
            counts=counts,
            settings=tuple(_setting(text, [*_ROLES, *_names(counts)]) for text in args.set),
        )


def _names(counts: Mapping[str, int]) -> list[str]:
    return [f"{role}-{i}" for role, count in counts.items() for i in range(count)]


def _setting(text: str, known: Sequence[str]) -> tuple[str, str, str]:
    path, equals, value = text.partition("=")
    role, dot, name = path.partition(".")
    if not equals or not dot or role not in known:
        raise ConfigError(
            f"--set {text!r}: expected ROLE.NAME=VALUE, ROLE one of {', '.join(known)}"
        )
    return role, name.replace("-", "_"), value


class _Process(msgspec.Struct):
    """What of an entry in `processes.json` is read again."""

    name: str
    pid: int


@dataclass(slots=True)
class Child:
    name: str
    role: str
    port: int
    """Where it listens; a worker: its /metrics."""
    log: Path
    process: asyncio.subprocess.Process
    waiter: "asyncio.Task[int]" = field(repr=False)


async def run_up(options: UpOptions, stop: asyncio.Event, stop_now: asyncio.Event) -> int:
    """Start everything, say how to ask, watch until told to stop."""
    fleet = _Fleet(options)
    try:
        await fleet.start(stop)
        if not stop.is_set():
            _say_how_to_ask(options, fleet)
            await fleet.watch(stop)
    finally:
        await fleet.stop(stop_now)
    return 0


class _Fleet:
    """The children, in the order they were started."""

    def __init__(self, options: UpOptions) -> None:
        self._options = options
        self.children: list[Child] = []
        self._nats_port = free_port()
        self._etcd_port = free_port()
        self._logs = options.state_dir / "logs"

    async def start(self, stop: asyncio.Event) -> None:
        options = self._options
        self._refuse_twin()
        _refuse_taken(options.host, options.port)
        self._logs.mkdir(parents=True, exist_ok=True)
        for folder in ("etcd", "nats"):  # registrations and messages of an earlier fleet are dead
            shutil.rmtree(options.state_dir / folder, ignore_errors=True)
        print(f"starting; logs in {self._logs}", flush=True)
        nats = nats_command(self._nats_port, options.state_dir / "nats")
        await self._spawn("nats", "nats", nats, self._nats_port)
        etcd = etcd_command(self._etcd_port, free_port(), options.state_dir / "etcd")
        await self._spawn("etcd", "etcd", etcd, self._etcd_port)
        await self._until(wait_for_port(self._nats_port), "nats-server", SERVER_TIMEOUT_S, stop)
        await self._until(wait_for_port(self._etcd_port), "etcd", SERVER_TIMEOUT_S, stop)
        await self._spawn("router", "router", self._router_command(), options.port)
        for role, count in options.counts.items():
            for i in range(count):
                name, metrics_port = f"{role}-{i}", free_port()
                command = self._worker_command(role, name, metrics_port)
                await self._spawn(name, role, command, metrics_port)
        total = sum(options.counts.values())
        await self._until(
            self._ready(total), f"{total} workers and a router", READY_TIMEOUT_S, stop
        )

    def _refuse_twin(self) -> None:
        """Two fleets in one state directory would wipe each other's data."""
        path = self._options.state_dir / "processes.json"
        if not path.exists():
            return
        for name, pid in open_processes(path):
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and str(self._options.state_dir).encode() in command.read_bytes():
                raise ConfigError(
                    f"{name} (pid {pid}) of another fleet still runs in "
                    f"{self._options.state_dir}: stop it, or use another --state-dir"
                )

    def _common(self, command: str) -> list[str]:
        options = self._options
        return [
            sys.executable,
            "-m",
            "baton",
            command,
            f"--nats=nats://127.0.0.1:{self._nats_port}",
            f"--etcd=http://127.0.0.1:{self._etcd_port}",
            f"--log-level={options.log_level}",
            f"--log-format={options.log_format}",
        ]

    def _router_command(self) -> list[str]:
        options = self._options
        flags = [f"--host={options.host}", f"--port={options.port}"]
        return [*self._common("router"), *flags, *self._extra("router")]

    def _worker_command(self, role: str, name: str, metrics_port: int) -> list[str]:
        options = self._options
        flags = [
            f"--role={role}",
            f"--name={name}",
            f"--engine={options.engine}",
            f"--transfer={options.transfer}",
            f"--metrics-port={metrics_port}",
        ]
        if options.model:
            flags.append(f"--model={options.model}")
        if options.engine == "torch":  # workers that fight for the same cores crawl
            total = sum(options.counts.values())
            flags.append(f"--threads={max(1, (os.cpu_count() or 1) // total)}")
        extra = [*self._extra("worker"), *self._extra(role), *self._extra(name)]
        return [*self._common("worker"), *flags, *extra]

    def _extra(self, role: str) -> list[str]:
        return [
            f"--{name.replace('_', '-')}={value}"
            for wanted, name, value in self._options.settings
            if wanted == role
        ]

    async def _spawn(self, name: str, role: str, command: Sequence[str], port: int) -> None:
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
            )
        waiter = asyncio.create_task(process.wait(), name=f"wait {name}")
        self.children.append(Child(name, role, port, log, process, waiter))
        self._write_processes()

    def _write_processes(self) -> None:
        listed = [
            {
                "name": child.name,
                "role": child.role,
                "pid": child.process.pid,
                "port": child.port,
                "log": str(child.log),
            }
            for child in self.children
        ]
        path = self._options.state_dir / "processes.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(listed)))
        temporary.replace(path)

    async def _until(
        self,
        ready: Coroutine[object, object, None],
        what: str,
        timeout_s: float,
        stop: asyncio.Event,
    ) -> None:
        """Wait for `ready`; a child that dies meanwhile, or the clock, is a ConfigError."""
        waiting = asyncio.ensure_future(ready)
        stopping = asyncio.ensure_future(stop.wait())
        try:
            done, _ = await asyncio.wait(
                [waiting, stopping, *(child.waiter for child in self.children)],
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if stopping in done:
                return
            if waiting in done:
                await waiting
                print(f"ready: {what}", flush=True)
                return
            for child in self.children:
                if child.waiter in done:
                    raise ConfigError(f"{child.name} ended at start: {_last_line(child.log)}")
            raise ConfigError(f"{what} not ready after {timeout_s:.0f} s; see {self._logs}")
        finally:
            waiting.cancel()
            stopping.cancel()

    async def _ready(self, num_workers: int) -> None:
        """Ask the router until it sees all workers eligible."""
        while True:
            info = await _get_json(self._options.host, self._options.port, "/cluster_info")
            workers = info.get("workers", []) if info else []
            if sum(1 for worker in workers if worker.get("eligible")) >= num_workers:
                return
            await asyncio.sleep(0.1)

    async def watch(self, stop: asyncio.Event) -> None:
        """Report what dies, until told to stop."""
        stopping = asyncio.ensure_future(stop.wait())
        alive = {child.waiter: child for child in self.children}
        while alive and not stop.is_set():
            done, _ = await asyncio.wait([stopping, *alive], return_when=asyncio.FIRST_COMPLETED)
            for waiter in [waiter for waiter in alive if waiter in done]:
                child = alive.pop(waiter)
                code = child.process.returncode
                print(f"{child.name} (pid {child.process.pid}) ended with {code}", flush=True)
        stopping.cancel()

    async def stop(self, stop_now: asyncio.Event) -> None:
        """Router first (it drains), then workers, then the servers under them."""
        for roles in (("router",), ("prefill", "decode", "both"), ("etcd", "nats")):
            group = [child for child in self.children if child.role in roles]
            await _end(group, stop_now)


def _refuse_taken(host: str, port: int) -> None:
    """A taken port is said before anything starts, and never mistaken for our own router."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    except OverflowError:
        raise ConfigError(f"port {port} is not a port") from None


async def _end(group: list[Child], stop_now: asyncio.Event) -> None:
    for child in group:
        if child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGCONT)
                child.process.terminate()
    waiters = [child.waiter for child in group]
    if not waiters:
        return
    hurry = asyncio.ensure_future(stop_now.wait())
    deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT_S
    pending = set(waiters)
    while pending and not hurry.done():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            break
        done, _ = await asyncio.wait(
            [*pending, hurry], timeout=left, return_when=asyncio.FIRST_COMPLETED
        )
        pending -= done
    hurry.cancel()
    for child in group:
        if child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
    await asyncio.wait(waiters)


def open_processes(path: Path) -> list[tuple[str, int]]:
    """Name and pid of what a fleet started, by its `processes.json`. Raises ConfigError."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=list[_Process])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path} is damaged: see what still runs, and remove it") from None
    return [(entry.name, entry.pid) for entry in entries]


async def _get_json(host: str, port: int, path: str) -> dict[str, Any] | None:
    """One plain HTTP request; None if there is no answer yet."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(_loopback(host), port)
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            data = await reader.read()
            writer.close()
        return msgspec.json.decode(data.partition(b"\r\n\r\n")[2], type=dict)
    except (OSError, TimeoutError, msgspec.DecodeError):
        return None


def _loopback(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"see {log}"


def _say_how_to_ask(options: UpOptions, fleet: _Fleet) -> None:
    model = Path(options.model).resolve().name if options.model else "demo"
    url = f"http://{_loopback(options.host)}:{options.port}"
    messages = [{"role": "user", "content": "Return the"}]
    body = msgspec.json.encode({"model": model, "stream": True, "messages": messages}).decode()
    print(
        f"\nBaton is up. Ask it:\n\n  curl -N {url}/v1/chat/completions "
        f"-H 'content-type: application/json' \\\n    -d '{body}'\n\n"
        f"  {url}/cluster_info   the workers\n  {url}/metrics        the numbers\n"
        f"  {options.state_dir}/processes.json   pids and logs (nats on "
        f"{fleet.children[0].port})\n\nCtrl-C stops it.",
        flush=True,
    )

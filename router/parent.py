"""The parent of several routers: holds the listening sockets and hands them to its children.

It binds once, so that no connection is lost while routers come and go: what the kernel has queued
is accepted by whoever is there. What it does when is decided in `crew`; here are the processes, the
signals and the clock. It knows no NATS, no etcd and no HTTP. SIGHUP: a rolling restart.

A child is the same command line once more, with the sockets' numbers. It has a session of its own:
Ctrl-C is the parent's to pass on, once. A child whose parent is gone drains by itself.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from protocol.errors import ConfigError
from router import crew
from router.config import RouterConfig
from router.inherited import FAMILY_DIR, RELIEVED, drain_timeout_of, is_ready

_log = logging.getLogger("baton.parent")

START_S: Final = 60.0
"""A successor that is not ready by then is not going to be."""
MARGIN_S: Final = 10.0
"""Beyond its own deadline for draining, for saying goodbye."""
HURRY_S: Final = 5.0
BACKLOG: Final = 1024
_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(slots=True)
class _Child:
    process: asyncio.subprocess.Process
    line: socket.socket


@dataclass(frozen=True, slots=True)
class _Event:
    tell: Callable[[float], list[crew.Command]]
    """Tells the crew, at the time it is given."""
    closes: bool = False
    """Nobody is to be accepted by us any more."""


async def run_parent(
    config: RouterConfig,
    arguments: Sequence[str],
    stop: asyncio.Event,
    stop_now: asyncio.Event,
    *,
    start_s: float = START_S,
) -> int:
    """Serve with `config.processes` children, each `baton` with these `arguments`, until `stop`
    (they drain) or `stop_now`. Returns the exit code. Raises ConfigError."""
    config.check()
    listeners = _listen(config.host, config.port)
    folder = _make_folder()
    try:
        async with asyncio.TaskGroup() as tasks:
            parent = _Parent(config, arguments, listeners, tasks, start_s, folder)
            code = await parent.run(stop, stop_now)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        for listener in listeners:
            listener.close()
    return code


def _make_folder() -> str:
    """Where the routers find each other; empty if there is no place for one."""
    try:
        return tempfile.mkdtemp(prefix="baton-routers-")
    except OSError as error:
        _log.warning("each router answers for itself alone: %s", error)
        return ""


def _listen(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of `host`, as a single router does. Raises ConfigError."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    return listeners


def _leave_s(drain_timeout_ms: int) -> float:
    return drain_timeout_ms / 1e3 + MARGIN_S


class _Parent:
    """Runs the commands of a crew and tells it what happened, one event after the other."""

    def __init__(
        self,
        config: RouterConfig,
        arguments: Sequence[str],
        listeners: Sequence[socket.socket],
        tasks: asyncio.TaskGroup,
        start_s: float,
        folder: str,
    ) -> None:
        self._environment = {**os.environ, FAMILY_DIR: folder}
        self._config = config
        self._arguments = arguments
        self._listeners = listeners
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._children: dict[int, _Child] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._code: int | None = None
        leave_s = _leave_s(config.drain_timeout_ms)
        self._crew = crew.Crew(config.processes, start_s=start_s, leave_s=leave_s, hurry_s=HURRY_S)

    async def run(self, stop: asyncio.Event, stop_now: asyncio.Event) -> int:
        self._say_where()
        self._loop.add_signal_handler(
            signal.SIGHUP, self._events.put_nowait, _Event(self._crew.hangup)
        )
        told = [self._tasks.create_task(self._until_told(event)) for event in (stop, stop_now)]
        try:
            await self._do(self._crew.begin(self._loop.time()))
            while self._code is None:
                event = await self._next_event()
                if event.closes:  # the children close theirs when they have drained
                    self._close_listeners()
                await self._do(event.tell(self._loop.time()))
            return self._code
        finally:
            for task in told:
                task.cancel()
            self._loop.remove_signal_handler(signal.SIGHUP)
            for number in self._children:  # only when we ourselves have failed
                self._signal(number, signal.SIGTERM)

    def _say_where(self) -> None:
        for listener in self._listeners:
            host, port = listener.getsockname()[:2]
            scheme = "https" if self._config.tls_cert else "http"
            place = f"[{host}]" if ":" in host else host
            _log.info("listening url=%s://%s:%d pid=%d", scheme, place, port, os.getpid())

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()

    # --- events ---

    async def _next_event(self) -> "_Event":
        due = self._crew.next_deadline()
        wait_s = None if due is None else max(0.0, due - self._loop.time())
        try:
            async with asyncio.timeout(wait_s):
                return await self._events.get()
        except TimeoutError:
            return _Event(self._crew.tick)

    async def _until_told(self, told: asyncio.Event) -> None:
        await told.wait()
        self._events.put_nowait(_Event(self._crew.stop, closes=True))

    def _on_line(self, number: int, line: socket.socket) -> None:
        """The child has said something, or is gone."""
        try:
            data = line.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(line)
        if is_ready(data):
            drain_timeout_ms = drain_timeout_of(data)
            leave_s = None if drain_timeout_ms is None else _leave_s(drain_timeout_ms)
            self._events.put_nowait(_Event(partial(self._crew.ready, number, leave_s=leave_s)))

    async def _until_ended(self, number: int, child: _Child) -> None:
        code = await child.process.wait()
        self._loop.remove_reader(child.line)
        child.line.close()
        del self._children[number]
        _log.info("router gone pid=%d code=%d", child.process.pid, code)
        self._events.put_nowait(_Event(partial(self._crew.ended, number, code)))

    # --- commands ---

    async def _do(self, commands: Sequence[crew.Command]) -> None:
        for command in commands:
            match command:
                case crew.Start(number, successor):
                    await self._start(number, successor)
                case crew.Relieve(number):
                    self._relieve(number)
                case crew.Stop(number):
                    self._signal(number, signal.SIGTERM)
                case crew.Kill(number):
                    self._signal(number, signal.SIGKILL)
                case crew.Say(level, text):
                    _log.log(_LEVELS[level], "%s", text)
                case crew.Leave(code):
                    self._code = code

    async def _start(self, number: int, successor: bool) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        listeners = [listener.fileno() for listener in self._listeners]
        command = [
            *(sys.executable, "-m", "baton", *self._arguments, "--processes=0"),
            f"--listen-fds={','.join(map(str, listeners))}",
            f"--line-fd={theirs.fileno()}",
            *(["--successor"] if successor else []),
        ]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(*listeners, theirs.fileno()),
                start_new_session=True,
                env=self._environment,
            )
        except OSError as error:
            ours.close()
            _log.error("cannot start a router: %s", error)
            self._events.put_nowait(_Event(partial(self._crew.ended, number, 1)))
            return
        finally:
            theirs.close()
        child = self._children[number] = _Child(process, ours)
        _log.info("router started pid=%d", process.pid)
        self._loop.add_reader(ours, self._on_line, number, ours)
        self._tasks.create_task(self._until_ended(number, child))

    def _relieve(self, number: int) -> None:
        """Said on the line before the signal: when that comes, it is known."""
        child = self._children.get(number)
        if child is not None:
            with contextlib.suppress(OSError):
                child.line.send(RELIEVED)
        self._signal(number, signal.SIGTERM)

    def _signal(self, number: int, what: signal.Signals) -> None:
        child = self._children.get(number)
        if child is not None and child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(what)

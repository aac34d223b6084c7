"""A fleet of real processes without a model, and what each kind of process has used.

Its workers have simulated engines, or each drives a mock OpenAI server as it would drive vLLM.

CPU is the scheduler's own count in nanoseconds, over all threads; a router's children count as the
router. Memory is the resident set.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from baton.demo import DEMO_MODEL, demo_model_folder
from protocol.errors import ConfigError

_START_TIMEOUT_S: Final = 60.0
ROLES: Final = ("router", "nats", "prefill", "decode")
"""What serves; etcd is not asked while requests run."""
MOCK: Final = "mock"
"""The role of mock OpenAI servers, where there are any."""
OTHER_COLUMNS: Final = {
    "nats": "nats-server",
    "prefill": "prefill",
    "decode": "decode",
    "service": "of these the loops",
    MOCK: "mock servers",
    "total": "total",
}
"""What is shown of `Used` beside the router, figure -> heading."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What to start."""

    engine: Literal["simulated", "openai"] = "simulated"
    step_ms: float = 0.0
    """Of the engine or the mock server; 0: no time."""
    prefill: int = 1
    decode: int = 1
    processes: int = 0
    """Routers under a parent; 0: one without."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """`ROLE.NAME` -> value, as `baton up --set` takes them."""

    @classmethod
    def of(cls, args: argparse.Namespace, *, step_ms: float = 0.0) -> "Shape":
        """By the flags that measurements with a fleet have in common."""
        return cls(args.engine, step_ms, args.prefill, args.decode, args.processes)

    @property
    def workers(self) -> list[str]:
        """Their names."""
        counts = {"prefill": self.prefill, "decode": self.decode}
        return [f"{role}-{i}" for role, count in counts.items() for i in range(count)]

    def command(self, state: Path, ports: Mapping[str, int]) -> list[str]:
        """`ports`: of the mock server beside each worker, by the worker's name."""
        settings = {
            "worker.served_model_name": DEMO_MODEL,
            "worker.sim_step_ms": f"{self.step_ms}",
            "worker.sim_prefill_tokens_per_s": "0",
            "worker.max_running": "512",
            "worker.max_step_tokens": "65536",
            "router.log_level": "warning",
            "worker.log_level": "warning",
            **({"router.processes": str(self.processes)} if self.processes else {}),
            **({"worker.engine": "vllm"} if ports else {}),
            **{f"{name}.url": f"http://127.0.0.1:{port}" for name, port in ports.items()},
            **self.settings,
        }
        return [
            *(sys.executable, "-m", "baton", "up", "--engine=simulated", "--port=0"),
            *(f"--prefill={self.prefill}", f"--decode={self.decode}", f"--state-dir={state}"),
            f"--model={demo_model_folder()}",  # for its tokenizer and template
            *(f"--set={name}={value}" for name, value in settings.items()),
        ]


class Process:
    """One kind of process: by its pids, whose children belong to it."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids

    def cpu_ns(self) -> int:
        return sum(_cpu_ns(pid) for root in self._pids for pid in _tree(root))

    def loop_ns(self) -> int:
        """Of the main threads alone: what a worker's service costs beside its engine."""
        return sum(_thread_ns(Path(f"/proc/{pid}/task/{pid}")) for pid in self._pids)

    def rss_mb(self) -> float:
        return sum(_rss_mb(pid) for root in self._pids for pid in _tree(root))


@dataclass(frozen=True, slots=True)
class Fleet:
    port: int
    nats_port: int
    kinds: dict[str, Process]
    """By role."""

    def used(self) -> "Used":
        return Used(
            {role: kind.cpu_ns() for role, kind in self.kinds.items()},
            self.kinds["prefill"].loop_ns() + self.kinds["decode"].loop_ns(),
        )


@dataclass(frozen=True, slots=True)
class Used:
    """Nanoseconds until some moment."""

    roles: dict[str, int]
    service: int
    """Of the workers' loops: part of what their roles used."""

    def each_us(self, after: "Used", units: int) -> dict[str, float]:
        """What was used for each of `units`, in microseconds: by role, in all, and by the workers'
        loops."""
        spent = {role: (after.roles[role] - self.roles[role]) / 1e3 / units for role in self.roles}
        service = (after.service - self.service) / 1e3 / units
        return {**spent, "total": sum(spent.values()), "service": service}


@asynccontextmanager
async def running(shape: Shape) -> AsyncIterator[Fleet]:
    """Raises ConfigError if it does not start."""
    async with AsyncExitStack() as stack:
        mocks = {
            name: await stack.enter_async_context(serving("mock_openai", shape.step_ms))
            for name in (shape.workers if shape.engine == "openai" else ())
        }
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        command = shape.command(state, {name: port for name, (port, _) in mocks.items()})
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        try:
            await _until_up(process)
            yield _fleet(state, [pid for _, pid in mocks.values()])
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@asynccontextmanager
async def serving(module: str, *args: object) -> AsyncIterator[tuple[int, int]]:
    """A server of this package as a process of its own: the port that it prints, and its pid."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"baton.bench.{module}", *map(str, args)),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline()), process.pid
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _until_up(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    with suppress(TimeoutError):
        async with asyncio.timeout(_START_TIMEOUT_S):
            while line := await process.stdout.readline():
                if b"Baton is up" in line:
                    return
    raise ConfigError("the fleet did not start; run `baton up --engine simulated` to see why")


def _fleet(state: Path, mocks: list[int]) -> Fleet:
    pids: dict[str, list[int]] = defaultdict(list)
    ports: dict[str, int] = {}
    for entry in json.loads((state / "processes.json").read_text()):
        pids[entry["role"]].append(entry["pid"])
        ports[entry["role"]] = entry["port"]
    kinds = {role: Process(*pids[role]) for role in ROLES}
    if mocks:
        kinds[MOCK] = Process(*mocks)
    return Fleet(ports["router"], ports["nats"], kinds)


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found.extend(int(child) for child in tasks.read_text().split())
    return found


def _cpu_ns(pid: int) -> int:
    return sum(_thread_ns(thread) for thread in Path(f"/proc/{pid}/task").glob("*"))


def _thread_ns(thread: Path) -> int:
    try:
        return int((thread / "schedstat").read_text().split()[0])
    except OSError:  # it has ended
        return 0


def _rss_mb(pid: int) -> float:
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

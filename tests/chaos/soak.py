"""`python -m tests.chaos.soak --minutes 3`: mixed traffic, a fault every few seconds, and what
grows.

A quarter of the time warms up: caches and bounded books fill. Then everything rests, is measured,
and runs on; at the end it rests again. RSS is a slope over the second part, file descriptors,
threads and tasks are compared at rest. `router`, `prefill-0` and `decode-0` are never killed, so
that they have a life to measure; their neighbours are.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.chaos.clients import Client, Socket
from tests.chaos.soak_faults import FAULTS
from tests.chaos.trial import mend
from tests.chaos.world import TRANSPORTS, ChaosFleet
from tests.e2e.streams import Ask, asks

NUM_CLIENTS: Final = 8
LEAVES: Final = 0.05
SETTINGS: Final = ("worker.num_blocks=2048", "worker.linger_ms=5000", "worker.sim_step_ms=4")
"""Books that fill while it warms up: blocks of the arena count as RSS once they were used, and what
is kept for replay is kept for `linger_ms`."""
EVERY_S: Final = 4.0
MEASURED: Final = ("router", "prefill-0", "decode-0")
MAX_MB_PER_MIN: Final = 1.0
WARM_SHARE: Final = 0.25
MORE_FDS: Final = 2
"""Connections to peers come and go; a leak is more than that in minutes of faults."""


class _Inline(Client):
    """A client in the thread that makes it."""

    def start(self) -> None:
        """Nobody else runs it."""


@dataclass
class Counts:
    requests: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    worst_s: float = 0.0


class Traffic:
    """Clients in threads, one request after the other, until told to stop."""

    def __init__(self, fleet: ChaosFleet, seed: int, clients: int) -> None:
        self.counts = Counts()
        self._fleet = fleet
        self._port = fleet.port
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}/{number}"),))
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """The number of clients that hang."""
        self._stopping.set()
        end = time.monotonic() + 60.0
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            prompt = int(rng.paretovariate(1.2) * 20) % 1_200 + 10
            ask = asks(1, rng.randint(2, 60), kind=f"soak {rng.random()}", prompt=prompt)[0]
            if rng.random() < LEAVES:
                self._leave(ask, rng.random() * 0.5)
                continue
            client = _Inline(self._fleet, ask, port=self._port)
            client.run()
            wrong = client.wrong()
            with self._lock:
                self.counts.requests += 1
                self.counts.worst_s = max(self.counts.worst_s, client.took_s)
                if wrong:
                    self.counts.wrong.append(f"{time.strftime('%X')} {wrong}")
                    print(f"  wrong: {wrong}", flush=True)

    def _leave(self, ask: Ask, after_s: float) -> None:
        one = Socket(self._port)
        one.ask(ask)
        self._stopping.wait(after_s)
        one.leave()
        with self._lock:
            self.counts.left += 1


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss_mb: float
    fds: int
    threads: int


def sample(pid: int, now: float) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(now, int(numbers["VmRSS"].split()[0]) / 1024, fds, int(numbers["Threads"]))


def slope_per_min(samples: list[Sample]) -> float:
    """Least squares of RSS, in MB a minute."""
    if len(samples) < 3:
        return 0.0
    mean_t = sum(s.at_s for s in samples) / len(samples)
    mean_m = sum(s.rss_mb for s in samples) / len(samples)
    over = sum((s.at_s - mean_t) * (s.rss_mb - mean_m) for s in samples)
    under = sum((s.at_s - mean_t) ** 2 for s in samples)
    return 60.0 * over / under


class Soak:
    """One run on one fleet."""

    def __init__(self, fleet: ChaosFleet, seed: int, clients: int) -> None:
        self._fleet = fleet
        self._clients = clients
        self._rng = random.Random(seed)
        self._pids = {name: fleet.process(name).pid for name in MEASURED}
        self.samples: dict[str, list[Sample]] = {name: [] for name in MEASURED}
        self.faults: dict[str, int] = {}
        self.counts: list[Counts] = []
        self.problems: list[str] = []

    def run(self, minutes: float) -> None:
        seconds = minutes * 60.0
        self._phase(seconds * WARM_SHARE)
        self._rest()
        before = self._at_rest()
        self.samples = {name: [] for name in MEASURED}
        self._phase(seconds * (1.0 - WARM_SHARE))
        self._rest()
        self._compare(before, self._at_rest())
        for name, samples in self.samples.items():
            slope = slope_per_min(samples)
            if slope >= MAX_MB_PER_MIN:
                self.problems.append(f"{name}: RSS grows by {slope:.2f} MB/min")

    def _phase(self, seconds: float) -> None:
        traffic = Traffic(self._fleet, self._rng.randrange(1 << 30), self._clients)
        self.counts.append(traffic.counts)
        end = time.monotonic() + seconds
        next_fault = time.monotonic() + EVERY_S
        try:
            while time.monotonic() < end:
                self._sample()
                if time.monotonic() >= next_fault:
                    self._break()
                    next_fault = time.monotonic() + EVERY_S * (0.5 + self._rng.random())
                time.sleep(1.0)
        finally:
            hanging = traffic.stop()
        if hanging:
            self.problems.append(f"{hanging} clients hang")
        self.problems += traffic.counts.wrong[:10]

    def _sample(self) -> None:
        for name, pid in self._pids.items():
            self.samples[name].append(sample(pid, time.monotonic()))

    def _break(self) -> None:
        fault = self._rng.choice(FAULTS)
        self.faults[fault.__name__] = self.faults.get(fault.__name__, 0) + 1
        print(f"  {time.strftime('%X')} {fault.__name__}", flush=True)
        fault(self._fleet, self._rng)

    def _rest(self) -> None:
        """Raises AssertionError if something is left that does not go."""
        mend(self._fleet)
        left = self._fleet.leftovers()
        self.problems += [f"left: {text}" for text in left]

    def _at_rest(self) -> dict[str, tuple[Sample, float]]:
        time.sleep(2.0)
        tasks = self._fleet.metric("baton_tasks")
        return {n: (sample(p, time.monotonic()), tasks) for n, p in self._pids.items()}

    def _compare(
        self, before: dict[str, tuple[Sample, float]], after: dict[str, tuple[Sample, float]]
    ) -> None:
        for name in MEASURED:
            (old, old_tasks), (new, new_tasks) = before[name], after[name]
            if new.fds > old.fds + MORE_FDS:
                self.problems.append(f"{name}: {old.fds} descriptors at rest became {new.fds}")
            if new.threads > old.threads:
                self.problems.append(f"{name}: {old.threads} threads at rest became {new.threads}")
            if name == "router" and new_tasks > old_tasks:
                self.problems.append(f"router: {old_tasks:.0f} tasks became {new_tasks:.0f}")
        self.rest = {
            name: {
                "rss_mb": [round(before[name][0].rss_mb, 1), round(after[name][0].rss_mb, 1)],
                "fds": [before[name][0].fds, after[name][0].fds],
                "threads": [before[name][0].threads, after[name][0].threads],
                "tasks": [before[name][1], after[name][1]] if name == "router" else [],
            }
            for name in MEASURED
        }

    def numbers(self) -> dict[str, Any]:
        return {
            "requests": sum(counts.requests for counts in self.counts),
            "left": sum(counts.left for counts in self.counts),
            "wrong": sum(len(counts.wrong) for counts in self.counts),
            "worst_s": round(max((counts.worst_s for counts in self.counts), default=0.0), 2),
            "faults": self.faults,
            "slope_mb_per_min": {n: round(slope_per_min(s), 2) for n, s in self.samples.items()},
            "at_rest": getattr(self, "rest", {}),
            "problems": self.problems,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--transport", default="shm", choices=TRANSPORTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        ChaosFleet(Path(folder), args.transport, settings=SETTINGS) as fleet,
    ):
        fleet.learn_ports()
        soak = Soak(fleet, args.seed, args.clients)
        try:
            soak.run(args.minutes)
        except KeyboardInterrupt:
            soak.problems.append("stopped")
        except AssertionError as error:
            soak.problems.append(str(error)[:2000])
        found = {"minutes": args.minutes, "transport": args.transport, **soak.numbers()}
    text = json.dumps(found, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(bool(found["problems"]))


if __name__ == "__main__":
    sys.exit(main())

"""What the soak breaks. Each fault is over when the function returns, but what it broke may still
be on its way back; one worker of each role is never killed."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Final

from tests.chaos.clients import Socket
from tests.chaos.world import ChaosFleet
from tests.e2e.fleet import is_alive
from tests.e2e.streams import asks

MORTAL: Final = ("prefill-1", "decode-1")
WORKERS: Final = ("prefill-0", "prefill-1", "decode-0", "decode-1")
CROWD: Final = 40


def _back(fleet: ChaosFleet, name: str, dead: str) -> None:
    fleet.restart(name)
    fleet.until_back(name, dead, timeout_s=20.0)


def kill_worker(fleet: ChaosFleet, rng: random.Random) -> None:
    name = rng.choice(MORTAL)
    dead = fleet.worker(name).get("incarnation", "")
    fleet.kill(name)
    time.sleep(rng.random() * 3.0)
    _back(fleet, name, dead)


def drain_worker(fleet: ChaosFleet, rng: random.Random) -> None:
    name = rng.choice(MORTAL)
    dead = fleet.worker(name).get("incarnation", "")
    fleet.terminate(name)
    assert fleet.until_ended(name, timeout_s=30.0) == 0, f"{name} did not leave with 0"
    _back(fleet, name, dead)


def freeze_worker(fleet: ChaosFleet, rng: random.Random) -> None:
    name = rng.choice(WORKERS)
    with fleet.frozen(name):
        time.sleep(0.5 + rng.random() * 5.0)
    fleet.until(lambda: name in fleet.eligible(), what=f"{name} back", timeout_s=45.0)


def freeze_server(fleet: ChaosFleet, rng: random.Random) -> None:
    with fleet.frozen(rng.choice(("nats", "etcd"))):
        time.sleep(0.5 + rng.random() * 4.0)


def restart_server(fleet: ChaosFleet, rng: random.Random) -> None:
    name = rng.choice(("nats", "etcd"))
    fleet.terminate(name)
    pid = fleet.process(name).pid
    fleet.until(lambda: not is_alive(pid), what=f"the end of {name}")
    time.sleep(rng.random() * 2.0)
    fleet.restart(name)


def pause_router(fleet: ChaosFleet, rng: random.Random) -> None:
    process = fleet.process("router")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        time.sleep(rng.random() * 2.0)
    finally:
        os.kill(process.pid, signal.SIGCONT)


def crowd_leaves(fleet: ChaosFleet, rng: random.Random) -> None:
    sockets = [Socket(fleet.port) for _ in range(CROWD)]
    wanted = asks(CROWD, 30, kind=f"crowd {rng.random()}", prompt=400)
    for one, ask in zip(sockets, wanted, strict=True):
        one.ask(ask)
    time.sleep(rng.random())
    for one in sockets:
        one.leave()


FAULTS: Final[tuple[Callable[[ChaosFleet, random.Random], None], ...]] = (
    kill_worker,
    drain_worker,
    freeze_worker,
    freeze_server,
    restart_server,
    pause_router,
    crowd_leaves,
)

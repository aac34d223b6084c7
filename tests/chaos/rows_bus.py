"""Rows that break the servers under the fleet, or the ways of one worker to them and to others."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.chaos import cuts
from tests.chaos.clients import start, until, wave
from tests.chaos.points import POINTS, standing
from tests.chaos.trial import Trial, Void
from tests.e2e.fleet import is_alive
from tests.e2e.streams import asks

NEW: Final = 20
CUT_S: Final = 8.0


def _new_ones(trial: Trial, over_s: float) -> None:
    """Twenty new requests, spread over the outage."""
    waves = max(1, min(10, int(over_s / 2)))
    for number in range(waves):
        trial.sleep_until(trial.fault_at + number * over_s / waves)
        trial.clients += start(trial.fleet, wave(NEW // waves, salt=f"{trial.salt} {number}"))
    trial.sleep_until(trial.fault_at + over_s)


def _everybody_stays(trial: Trial, before: dict[str, str]) -> None:
    fleet = trial.fleet
    trial.until(lambda: set(before) <= set(fleet.eligible()), "everybody eligible", timeout_s=40.0)
    now = {w["worker_id"]: w["incarnation"] for w in fleet.cluster_info()["workers"]}
    if any(now.get(name) != incarnation for name, incarnation in before.items()):
        trial.wrong.append(f"not the same workers: {before} became {now}")


def incarnations(trial: Trial) -> dict[str, str]:
    """Of those that get work."""
    workers = trial.fleet.cluster_info()["workers"]
    return {w["worker_id"]: w["incarnation"] for w in workers if w["eligible"]}


def server(
    trial: Trial, *, name: str, away_s: float, how: str, streams_wait: bool, point: str
) -> None:
    """A server is away for a while; `streams_wait`: nothing can flow without it."""
    fleet = trial.fleet
    before = incarnations(trial)
    with standing(trial, POINTS["decode", point]):
        trial.broke()
        _take(trial, name, how)
    if how in ("kill", "freeze"):
        _new_ones(trial, away_s)
        _give_back(trial, name, how)
    else:
        trial.clients += start(fleet, wave(NEW, salt=trial.salt))
    if streams_wait:
        until(lambda: _bus_up(trial), timeout_s=10.0)
        trial.outage_s = time.monotonic() - trial.fault_at
    trial.join()
    if name == "etcd":
        trial.until(
            lambda: fleet.cluster_info()["discovery_synced"], "synced discovery", timeout_s=15.0
        )
    _everybody_stays(trial, before)
    trial.look()


def _bus_up(trial: Trial) -> bool:
    return bool(trial.fleet.cluster_info()["bus_up"])


def _take(trial: Trial, name: str, how: str) -> None:
    fleet = trial.fleet
    if how == "freeze":
        os.kill(fleet.process(name).pid, signal.SIGSTOP)
    elif how == "kill":
        fleet.kill(name)
    elif how == "restart":
        fleet.terminate(name)
        until(lambda: not is_alive(fleet.process(name).pid), timeout_s=10.0)
        fleet.restart(name)
    elif how == "empty":
        flags = [flag for flag in fleet.command(name) if flag.startswith("--data-dir=")]
        fleet.kill(name)
        shutil.rmtree(Path(flags[0].partition("=")[2]))
        fleet.restart(name)


def _give_back(trial: Trial, name: str, how: str) -> None:
    if how == "freeze":
        os.kill(trial.fleet.process(name).pid, signal.SIGCONT)
    else:
        trial.fleet.restart(name)


def no_way(trial: Trial, *, role: str, point: str, cut: str) -> None:
    """One worker is behind a proxy: NATS does not reach it, its peers do."""
    fleet = trial.fleet
    proxy = cuts.Proxy(fleet.process("nats").port)
    name = f"{role}-x"
    try:
        fleet.add_like(name, role, f"--nats=nats://127.0.0.1:{proxy.port}")
        trial.before.add(name)
        _strike(trial, role, point, name, proxy.cut if cut == "cut" else proxy.swallow, proxy.mend)
    finally:
        _dismiss(trial, name)
        proxy.close()


def _dismiss(trial: Trial, name: str) -> None:
    """The row's own worker leaves; one that went by itself before is missed."""
    if is_alive(trial.fleet.process(name).pid):
        code = trial.fleet.stop_extra(name)
        trial.before.discard(name)
        if code:
            trial.wrong.append(f"{name} left with {code}")


def _strike(
    trial: Trial, role: str, point: str, name: str, cut: Callable[[], Any], mend: Callable[[], Any]
) -> None:
    before = incarnations(trial)
    with standing(trial, POINTS[role, point]):
        stands = POINTS[role, point].stands
        trial.hit = sum(stands(trial.story(c.request_id)) == name for c in trial.clients)
        trial.broke()
        cut()
    if not trial.hit:
        raise Void(f"nobody at {point} with {name}")
    trial.clients += start(trial.fleet, wave(NEW, salt=trial.salt))
    trial.sleep_until(trial.fault_at + CUT_S)
    mend()
    trial.join()
    _everybody_stays(trial, before)
    trial.look()


def no_peers(trial: Trial, *, point: str) -> None:
    """One prefill worker's transfers cannot be reached any more; NATS reaches it."""
    fleet = trial.fleet
    with cuts.own_address() as wrong:
        if wrong:
            raise Void(f"no address of our own: {wrong}")
        name = "prefill-x"
        fleet.add_like(name, "prefill", f"--host={cuts.PEER_ADDRESS}")
        trial.before.add(name)
        try:
            _strike(trial, "prefill", point, name, cuts.take_away, cuts.give_back)
        finally:
            _dismiss(trial, name)


def slow_nats(trial: Trial) -> None:
    """A decode worker's way to NATS carries 20 kB/s: slow is not silent."""
    fleet = trial.fleet
    proxy = cuts.Proxy(fleet.process("nats").port, bytes_per_s=20_000)
    try:
        fleet.add_like("decode-x", "decode", f"--nats=nats://127.0.0.1:{proxy.port}")
        trial.before.add("decode-x")
        trial.broke()
        trial.clients += start(fleet, asks(8, 150, kind=f"{trial.salt} held", prompt=200))
        trial.clients += start(fleet, wave(NEW, salt=trial.salt))
        trial.join()
        given = [s.detail for c in trial.clients for s in trial.story(c.request_id)]
        trial.hit = given.count("decode-x")
        trial.look()
    finally:
        _dismiss(trial, "decode-x")
        proxy.close()


def _server(name: str, how: str, away_s: float, point: str = "mid-decode") -> Callable[..., None]:
    wait = name == "nats"
    return partial(server, name=name, how=how, away_s=away_s, streams_wait=wait, point=point)


PATIENT: Final[dict[str, Any]] = {"settings": ("router.queue_timeout_ms=30000",)}
"""New requests wait in the queue while no job can be sent."""
TCP: Final[dict[str, Any]] = {"transports": ("tcp",)}
ROWS: Final[tuple[tuple[str, Callable[[Trial], None], dict[str, Any]], ...]] = (
    ("etcd/killed-60s", _server("etcd", "kill", 60.0), {}),
    ("etcd/frozen-40s", _server("etcd", "freeze", 40.0), {}),
    ("etcd/restarted-empty", _server("etcd", "empty", 0.0), {}),
    ("nats/killed-10s/mid-decode", _server("nats", "kill", 10.0), PATIENT),
    ("nats/killed-10s/mid-pull", _server("nats", "kill", 10.0, "mid-pull"), PATIENT),
    ("nats/frozen-10s/mid-decode", _server("nats", "freeze", 10.0), PATIENT),
    ("nats/frozen-10s/mid-pull", _server("nats", "freeze", 10.0, "mid-pull"), PATIENT),
    ("nats/restarted", _server("nats", "restart", 0.0), PATIENT),
    *(
        (f"no-nats-but-peers/{role}/{point}/{cut}",
         partial(no_way, role=role, point=point, cut=cut), {})
        for role, point in (
            ("prefill", "mid-pull"), ("decode", "mid-pull"), ("decode", "mid-decode"),
        )
        for cut in ("cut", "deaf")
    ),
    ("no-peers-but-nats/prefill/mid-pull", partial(no_peers, point="mid-pull"), TCP),
    ("no-peers-but-nats/prefill/handle-waiting", partial(no_peers, point="handle-waiting"), TCP),
    ("slow-nats/decode", slow_nats, {}),
)  # fmt: skip

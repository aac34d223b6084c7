"""Carries out a plan: starts the fleet, sends the requests, makes the faults, ends them, and looks.

It judges nothing (`oracles` does); it keeps the record that judging needs: who lived when, and
which trouble touched whom.
"""

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import LocalError
from router.scheduling.limits import Limits
from tests.sim import faults
from tests.sim.bus import SimHub
from tests.sim.clients import Client, make_clients
from tests.sim.loop import SimLoop
from tests.sim.plan import ACTIVE_S, Plan, Request
from tests.sim.processes import SimRouter, SimServer, SimWorker
from tests.sim.transfer import BLOCK_S, Fabric
from worker.config import WorkerConfig
from worker.engine.messages import StepperConfig
from worker.engine.simulated import SimulatedConfig

LEASE_S: Final = 6.0
LINGER_S: Final = 4.0
ROUTER_TIMEOUT_S: Final = 6.0
LIMITS: Final = Limits(
    queue_timeout_s=10.0,
    accept_timeout_s=1.0,
    silence_timeout_s=2.5,
    prefill_timeout_s=5.0,
    decode_wait_timeout_s=10.0,
    kv_transfer_timeout_s=4.0,
    stall_timeout_s=6.0,
    replay_timeout_s=1.0,
    max_queue=64,
    lease_s=LEASE_S,
    unlisted_grace_s=6.0,
    suspect_s=0.5,
    suspect_max_s=4.0,
)
START_S: Final = 10.0
END_S: Final = 60.0
"""After the last fault every choice has ended within this."""
SETTLE_S: Final = LEASE_S + LINGER_S + ROUTER_TIMEOUT_S + 4.0
RESTART_S: Final = 1.0
NUM_PROBES: Final = 4
LOOK_S: Final = 1.0
MAX_FAILURES: Final = 20


@dataclass(slots=True)
class Trouble:
    """A fault as it was: whom it touched, and when."""

    kind: str
    target: str
    """An incarnation, a router's id, or `*`."""
    began_at: float
    ended_at: float = float("inf")
    share: float = 0.0
    """Of what is lost, where something is."""


@dataclass(slots=True)
class Past:
    """When a worker's incarnation was of use."""

    worker: SimWorker
    from_s: float
    until_s: float = float("inf")


@dataclass
class Record:
    """What happened; the end of it is shown where a seed fails."""

    keeps: int | None = 400
    lines: deque[str] = field(default_factory=deque)
    digest: "hashlib._Hash" = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def note(self, now: float, text: str) -> None:
        self.lines.append(f"{now:10.4f}  {text}")
        if self.keeps is not None and len(self.lines) > self.keeps:
            self.lines.popleft()


class Fleet:
    """One run of one plan. Make it inside of the loop."""

    def __init__(self, loop: SimLoop, plan: Plan, record: Record) -> None:
        self.loop = loop
        self.plan = plan
        self.record = record
        seed = plan.seed
        self.rng = random.Random(f"fleet {seed}")
        self.hub = SimHub(loop, random.Random(f"bus {seed}"), self._tap)
        self.server = SimServer()
        slow = 10.0 if plan.slow_transfers else 1.0
        pace = (BLOCK_S[0] * slow, BLOCK_S[1] * slow)
        self.fabric = Fabric(loop, random.Random(f"fabric {seed}"), plan.transfers, pace)
        self.model = SimulatedConfig(
            name="m",
            num_blocks=plan.num_blocks,
            block_size=4,
            kv_bytes_per_token=16,
            max_running=plan.max_running,
            max_context=256,
            prefill_tokens_per_s=plan.prefill_tokens_per_s,
            step_s=plan.step_s,
            eos_every=40,
            num_leases=plan.num_leases,
            num_scratch=4,
        )
        self.stepper = StepperConfig(
            "",
            "",
            max_running=plan.max_running,
            max_step_tokens=32,
            lease_s=LEASE_S,
            transfer_timeout_s=LIMITS.kv_transfer_timeout_s,
            max_tokens_in_flight=plan.max_tokens_in_flight,
            validate=True,
        )
        self.workers: dict[str, SimWorker] = {}
        """The last life of each."""
        self.lives: list[SimWorker] = []
        self.past: list[Past] = []
        self.routers: dict[str, SimRouter] = {}
        self.router_lives: list[SimRouter] = []
        self.clients: list[Client] = []
        self.troubles: list[Trouble] = []
        self.turned_away = 0
        """Requests that no router was there for."""
        self.calm_at = float("inf")
        self.over = False
        self._numbers = 0

    # -- processes

    def start_worker(self, name: str) -> SimWorker:
        """A new incarnation."""
        role = self.plan.roles[self.plan.names().index(name)]
        life = 1 + sum(worker.name == name for worker in self.lives)
        config = WorkerConfig(
            name=name,
            role=role,
            engine="simulated",
            served_model_name="m",
            linger_ms=int(LINGER_S * 1e3),
            router_timeout_ms=int(ROUTER_TIMEOUT_S * 1e3),
            etcd_ttl_ms=3000,
            drain_timeout_ms=8000,
        )
        worker = SimWorker(
            self.loop, self.hub, self.server, self.fabric, random.Random(f"{name} {life}"),
            name=name, life=life, role=role, model=self.model, stepper=self.stepper,
            config=config, on_exit=self._worker_over,
        )  # fmt: skip
        self.note(f"{worker.incarnation} starts")
        self.lives.append(worker)
        self.past.append(Past(worker, self.loop.time()))
        if name not in self.workers or not self.workers[name].alive:
            self.workers[name] = worker
        return worker

    def start_router(self, name: str) -> SimRouter:
        life = 1 + sum(router.name == name for router in self.router_lives)
        router = SimRouter(
            self.loop, self.hub, self.server, random.Random(f"{name} {life} {self.plan.seed}"),
            name=name, life=life, limits=LIMITS, on_exit=self._router_over,
        )  # fmt: skip
        self.note(f"{router.router_id} starts")
        self.router_lives.append(router)
        self.routers[name] = router
        return router

    def useless(self, worker: SimWorker) -> None:
        """From now on nobody may count on it."""
        for past in self.past:
            if past.worker is worker:
                past.until_s = min(past.until_s, self.loop.time())

    def _worker_over(self, worker: SimWorker, why: str) -> None:
        self.note(f"{worker.incarnation} is over: {why}")
        self.useless(worker)
        for trouble in self.troubles:
            if trouble.target == worker.incarnation:
                trouble.ended_at = min(trouble.ended_at, self.loop.time())
        if self.over:
            return
        others = [one for one in self.lives if one.name == worker.name and one.alive]
        if others:
            self.workers[worker.name] = others[-1]
        elif why in ("unhealthy", "twin"):
            self.later(RESTART_S, lambda: faults.restart(self, worker.name))

    def _router_over(self, router: SimRouter) -> None:
        self.note(f"{router.router_id} is over")
        for client in self.clients:
            if client.router is router and not client.over:
                client.deserted = True

    # -- the run

    async def run(self) -> None:
        """Until everything that was begun has ended and the fleet has settled."""
        for name in self.plan.names():
            self.start_worker(name)
        for number in range(self.plan.num_routers):
            self.start_router(f"r{number}")
        await self.until(self.is_whole, START_S, "the fleet did not start")
        self._look_at_books()
        for request in self.plan.requests:
            self.later(request.at, lambda request=request: self.send(request))  # type: ignore[misc]
        for fault in self.plan.faults:
            self.later(fault.at, lambda fault=fault: faults.begin(self, fault))  # type: ignore[misc]
        ends = [fault.at + fault.for_s for fault in self.plan.faults]
        await asyncio.sleep(max([ACTIVE_S, *ends]) + 0.5)
        faults.end_all(self)
        self.calm_at = self.loop.time()
        self.note("all faults are over")
        await self.until(self._all_ended, END_S, "choices do not end")
        faults.replace_dead(self)
        await self.until(self.is_whole, END_S, "the fleet is not whole again")
        await asyncio.sleep(SETTLE_S)

    async def probe(self) -> list[Client]:
        """Some requests to the quiet fleet, one after the other; they must succeed."""
        before = len(self.clients)
        for number in range(NUM_PROBES):
            prompt = tuple(97 + (number * 7 + i) % 26 for i in range(20))
            self.send(Request(0.0, prompt, 6, router=number))
            await asyncio.sleep(1.5)
        await self.until(self._all_ended, END_S, "probes do not end")
        await asyncio.sleep(LINGER_S + 3.0)
        return self.clients[before:]

    async def until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        limit = self.loop.time() + limit_s
        while not condition():
            if self.loop.time() > limit:
                raise AssertionError(f"{what} within {limit_s} s")
            await asyncio.sleep(0.1)

    def is_whole(self) -> bool:
        """Every router that lives could send work to every worker that lives."""
        names = {worker.name for worker in self.lives if worker.alive}
        if {worker.name for worker in self.lives if worker.alive and worker.registered} != names:
            return False
        for router in self.routers.values():
            if not router.accepting:
                return False
            views = router.dispatch.scheduler.workers()
            if {view.info.worker_id for view in views if view.eligible} != names:
                return False
        return True

    def _look_at_books(self) -> None:
        """Every scheduler's books agree at every moment: here, once a second."""
        for router in self.router_lives:
            if router.alive:
                try:
                    router.dispatch.scheduler.validate()
                except LocalError as error:
                    self.loop.failures.append(f"{router.router_id}: {error}")
        if not self.over and len(self.loop.failures) < MAX_FAILURES:
            self.later(LOOK_S, self._look_at_books)

    def _all_ended(self) -> bool:
        return all(client.over for client in self.clients)

    # -- requests

    def send(self, request: Request) -> None:
        """A client finds a router that takes connections, as a load balancer does."""
        routers = list(self.routers.values())
        at = request.router % len(routers)
        for router in routers[at:] + routers[:at]:
            if router.accepting:
                break
        else:
            self.turned_away += 1
            return
        self._numbers += 1
        now = self.loop.time()
        clients = make_clients(request, self._numbers, router, self.model, now)
        self.clients += clients
        for client in clients:
            self.note(f"{client.spec.choice} to {router.router_id}")
            router.process.call(router.dispatch.submit, client.spec, client)
            if request.cancel_after_s >= 0:
                router.process.call(client.cancel, after_s=request.cancel_after_s)

    # -- the record

    def note(self, text: str) -> None:
        self.record.note(self.loop.time(), text)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        self.loop.call_later(seconds, what)

    def _tap(self, sender: str, receiver: str, subject: str, payload: bytes) -> None:
        record = self.record
        line = f"{self.loop.time():.6f} {sender} {receiver} {subject}"
        record.digest.update(line.encode())
        record.digest.update(payload)
        if record.keeps is None and not subject.endswith("routers"):
            self.note(f"{sender} -> {receiver}  {subject}  {payload[:160]!r}")

    def close(self) -> None:
        """Give the memory back."""
        self.over = True
        for worker in self.lives:
            worker.process.kill()
            worker.close_memory()
        for router in self.router_lives:
            router.process.kill()

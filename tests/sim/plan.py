"""What happens in one seed: the fleet, the requests and the faults. Pure values, drawn from a seed.

A plan can be read, printed, and run again with some of its faults left out. It knows nothing of how
it is carried out.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

from protocol.worker_info import Role
from tests.sim.transfer import Kind

FaultKind = Literal[
    "crash",  # a worker dies; it comes back as a new incarnation after `for_s`, or never (0)
    "freeze",  # a worker stands still for `for_s`; for ever (0), until it is killed in the end
    "cut_bus",  # a worker and the bus do not hear each other
    "cut_peers",  # a worker's memory cannot be reached by its peers, nor theirs by it
    "cut_registry",  # a worker does not reach the registry: its lease runs out
    "engine_hangs",  # a worker's engine stands still, but the rest of the worker does not
    "step_fails",  # a worker's engine fails a step: it says so and exits; restarted after `for_s`
    "drain",  # a worker is told to leave, and started again after `for_s`
    "twin",  # a second process under a worker's name
    "router_crash",  # a router dies and is started again under another id
    "router_freeze",
    "router_cut_bus",
    "bus_down",  # the bus's server is away
    "registry_down",  # refuses all calls
    "registry_frozen",  # answers nothing
    "registry_empty",  # comes back without its data
    "loss",  # messages vanish
    "slow_worker",  # a worker's subscriptions drop messages, and say so
    "slow_router",
    "flaky_transfers",
    "hanging_transfers",  # nobody notices that a source has died
    "burst",  # more requests than the fleet can take
]

WORKER_FAULTS: Final[tuple[FaultKind, ...]] = (
    "crash", "crash", "freeze", "freeze", "cut_bus", "cut_bus", "cut_peers", "cut_registry",
    "step_fails", "drain", "twin", "slow_worker", "engine_hangs",
)  # fmt: skip
ROUTER_FAULTS: Final[tuple[FaultKind, ...]] = (
    "router_crash", "router_freeze", "router_cut_bus", "slow_router",
)  # fmt: skip
FLEET_FAULTS: Final[tuple[FaultKind, ...]] = (
    "bus_down", "registry_down", "registry_frozen", "registry_empty", "loss", "flaky_transfers",
    "hanging_transfers", "burst",
)  # fmt: skip

ACTIVE_S: Final = 30.0
"""Requests and faults begin within this time."""


@dataclass(frozen=True)
class Fault:
    at: float
    kind: FaultKind
    target: str = ""
    """A worker's or a router's name."""
    for_s: float = 0.0
    share: float = 0.0
    """Of messages lost, or of pieces that fail."""


@dataclass(frozen=True)
class Request:
    """`n` choices of one prompt."""

    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = True
    stop_at: int = -1
    """A stop string that the undisturbed answer has behind so many tokens."""
    router: int = 0
    cancel_after_s: float = -1.0
    cancel_at_token: int = -1


@dataclass(frozen=True)
class Plan:
    seed: int
    roles: tuple[Role, ...]
    num_routers: int
    transfers: Kind
    num_blocks: int
    max_running: int
    num_leases: int
    step_s: float
    slow_transfers: bool
    prefill_tokens_per_s: float
    max_tokens_in_flight: int | None
    requests: tuple[Request, ...]
    faults: tuple[Fault, ...]

    def names(self) -> list[str]:
        """Of the workers."""
        return [f"{role[0]}{number}" for number, role in enumerate(self.roles)]


def make_plan(seed: int) -> Plan:
    """The plan of a seed. One in ten has no faults at all: then nothing may fail."""
    rng = random.Random(seed)
    roles: list[Role] = ["prefill"] * rng.choice((1, 1, 2)) + ["decode"] * rng.choice((1, 2, 2))
    if rng.random() < 0.3:
        roles.append("both")
    num_routers = rng.choice((1, 1, 2))
    prefixes = [_ids(rng, rng.randrange(4, 40)) for _ in range(3)]
    requests = [
        _request(rng, prefixes, num_routers, rng.uniform(0.0, ACTIVE_S))
        for _ in range(rng.randrange(8, 26))
    ]
    if seed % 5 == 2:
        return _stale_plan(rng, seed)
    plan = Plan(
        seed=seed,
        roles=tuple(roles),
        num_routers=num_routers,
        transfers=rng.choice(("fabric", "shm", "tcp")),
        num_blocks=rng.choice((64, 128, 256)),
        max_running=rng.choice((4, 16, 64)),
        num_leases=rng.choice((2, 64, 64)),
        step_s=rng.choice((0.01, 0.03, 0.08)),
        slow_transfers=rng.random() < 0.25,
        prefill_tokens_per_s=rng.choice((60.0, 2000.0, 2000.0)),
        max_tokens_in_flight=rng.choice((None, None, 64)),
        requests=(),
        faults=(),
    )
    faults = [] if seed % 10 == 0 else _faults(rng, plan)
    for fault in faults:
        if fault.kind == "burst":
            requests += [
                _request(rng, prefixes, num_routers, fault.at + rng.uniform(0.0, 0.3))
                for _ in range(rng.randrange(20, 60))
            ]
    requests.sort(key=lambda request: request.at)
    return _with(plan, tuple(requests), tuple(sorted(faults, key=lambda fault: fault.at)))


def _stale_plan(rng: random.Random, seed: int) -> Plan:
    """A decode worker loses its source and the bus in the middle of its pulls. The handles go to
    the other one, are given back, and their blocks are used for other prompts; then the source is
    there again, before any word of it. The same prompts come once more: KV that was believed after
    its lease had ended says something else."""
    requests: list[Request] = []
    faults: list[Fault] = []
    for at in (2.0 + rng.random(), 12.0 + rng.random(), 21.0 + rng.random()):
        prompts = [_ids(rng, rng.randrange(30, 60)) for _ in range(4)]
        noise = [_ids(rng, rng.randrange(30, 60)) for _ in range(8)]
        requests += [Request(at - rng.uniform(0.05, 0.4), prompt, 8) for prompt in prompts]
        requests += [Request(at + rng.uniform(0.3, 3.5), prompt, 4) for prompt in noise]
        again = [prompt for prompt in prompts for _ in range(2)]
        requests += [Request(at + rng.uniform(6.0, 8.5), prompt, 8) for prompt in again]
        name = rng.choice(("d1", "d2"))
        faults += [Fault(at, "cut_peers", name, 3.6), Fault(at, "cut_bus", name, 4.5)]
    return Plan(
        seed=seed,
        roles=("prefill", "decode", "decode"),
        num_routers=1,
        transfers=rng.choice(("fabric", "shm")),
        num_blocks=48,
        max_running=16,
        num_leases=16,
        step_s=0.03,
        slow_transfers=True,
        prefill_tokens_per_s=2000.0,
        max_tokens_in_flight=None,
        requests=tuple(sorted(requests, key=lambda request: request.at)),
        faults=tuple(faults),
    )


def without(plan: Plan, fault: Fault) -> Plan:
    return _with(plan, plan.requests, tuple(one for one in plan.faults if one is not fault))


def _with(plan: Plan, requests: tuple[Request, ...], faults: tuple[Fault, ...]) -> Plan:
    return Plan(**{**plan.__dict__, "requests": requests, "faults": faults})


def _ids(rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.randrange(97, 123) for _ in range(number))


def _request(
    rng: random.Random, prefixes: list[tuple[int, ...]], num_routers: int, at: float
) -> Request:
    prompt = _ids(rng, rng.randrange(1, 60))
    if rng.random() < 0.5:
        prompt = rng.choice(prefixes) + prompt[: rng.randrange(1, 12)]
    max_tokens = rng.choice((1, 2, 8, 20, 20, 40, 90))
    cancels = rng.random()
    return Request(
        at=at,
        prompt=prompt,
        max_tokens=max_tokens,
        n=rng.choice((1, 1, 1, 1, 2, 3)),
        temperature=rng.choice((0.0, 0.8)),
        seed=rng.randrange(1 << 30),
        ignore_eos=rng.random() < 0.7,
        stop_at=rng.randrange(max_tokens) if rng.random() < 0.15 else -1,
        router=rng.randrange(num_routers),
        cancel_after_s=rng.choice((0.0, 0.01, 0.05, 0.3, 2.0)) if cancels < 0.1 else -1.0,
        cancel_at_token=rng.randrange(1, 20) if 0.1 <= cancels < 0.15 else -1,
    )


def _faults(rng: random.Random, plan: Plan) -> list[Fault]:
    """Usually a few; sometimes one after the other, so that second chances meet the next fault."""
    names = plan.names()
    routers = [f"r{number}" for number in range(plan.num_routers)]
    faults: list[Fault] = []
    number = rng.choice((1, 1, 2, 3, 4, 6))
    around = rng.uniform(2.0, ACTIVE_S - 5.0)
    crowded = rng.random() < 0.4
    for _ in range(number):
        at = around + rng.uniform(0.0, 4.0) if crowded else rng.uniform(1.0, ACTIVE_S)
        group = rng.choices((WORKER_FAULTS, ROUTER_FAULTS, FLEET_FAULTS), (6, 2, 3))[0]
        kind = rng.choice(group)
        if group is WORKER_FAULTS:
            target = rng.choice(names)
        else:
            target = rng.choice(routers) if group is ROUTER_FAULTS else ""
        for_s = rng.choice((0.3, 1.0, 2.0, 4.0, 8.0, 14.0))
        for_ever = {"crash": 0.15, "freeze": 0.15, "engine_hangs": 0.6}.get(kind, 0.0)
        if rng.random() < for_ever:
            for_s = 0.0
        faults.append(Fault(at, kind, target, for_s, rng.choice((0.02, 0.1, 0.4, 1.0))))
    return faults

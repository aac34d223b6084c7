"""What must be true of a run: of every client, of every process, and of the fleet at rest.

**No error where another worker was there.** An error is legitimate only where its cause was
injected: the client went; more came than the fleet takes; or trouble took all the second
chances there are. Looked at is the time from shortly before the choice came until it ended:

- one worker that can decode (it can prefill for itself), was registered all the time and was
  touched by nothing, as were its router and the fleet as a whole: no error at all;
- a single trouble of a router, the bus, or the wire, not longer than a queue's deadline: no error;
- a single trouble of a worker, and another worker that can decode: no error;
- nobody waits until its deadline beside workers that have nothing to do (`idleness`);
- `no_decode_worker` only where all that can decode were touched or the router was deaf for long;
  `worker_killer` only where three were touched; trouble with the registry excuses nothing.
"""

from typing import TYPE_CHECKING, Final

from router.outcomes import OUTCOMES
from tests.sim.bus import SimBus
from tests.sim.clients import Client
from tests.sim.faults import FREE_FAULTS

if TYPE_CHECKING:
    from tests.sim.fleet import Fleet, Trouble
    from tests.sim.processes import SimRouter, SimWorker

RECOVERY_S: Final = 8.0
"""So long after its end a trouble may still be felt: reconnecting, suspicion, a new lease."""
BURST_S: Final = 25.0
FULL: Final = 0.2
"""Of one worker's time: with more than this, and some of it done again, a queue may build up."""
LIFE_S: Final = 75.0
"""No choice lives longer: the sum of its deadlines, with the outages that stop the clocks."""
SHORT_S: Final = 8.1
"""One trouble this short, of the bus, the wire or a router, must cost nobody anything."""
LIGHT_LOSS: Final = 0.1
"""Of all messages, without a word: so much is made good."""
AT_ONCE: Final = 4
_OVERLOAD: Final = frozenset({"queue_full", "queue_timeout", "decode_wait_timeout"})
_EXPECTED: Final = ("a step failed",)


def is_expected(text: str) -> bool:
    """Errors that the product logs since we injected them."""
    return any(part in text for part in _EXPECTED)


def judge(fleet: "Fleet") -> list[str]:
    idle = [text for router in fleet.router_lives for text in router.idleness.problems]
    return judge_clients(fleet) + idle + judge_rest(fleet)


def judge_clients(fleet: "Fleet") -> list[str]:
    """Every choice that has ended, or should have."""
    problems = []
    for client in fleet.clients:
        problem = _problem_of(fleet, client)
        if problem:
            problems.append(f"{client.spec.choice} on {client.router.router_id}: {problem}")
    return problems


def judge_probes(fleet: "Fleet", probes: list[Client]) -> list[str]:
    """A quiet fleet serves everybody, and is as empty as before when it has."""
    problems = [
        f"probe {client.spec.choice}: {client.error}" for client in probes if client.error or
        not client.over
    ]  # fmt: skip
    return problems + judge_rest(fleet)


def stories(fleet: "Fleet") -> list[str]:
    """What the schedulers remember of the choices that ended in an error or not at all."""
    lines = []
    for client in fleet.clients:
        if client.over and client.error is None and not client.deserted:
            continue
        story = client.router.dispatch.scheduler.story(client.spec.choice)
        lines.append(f"story of {client.spec.choice} ({client.error}):")
        lines += [f"    {at:10.4f}  {' '.join(map(str, what))}" for at, *what in story]
    return lines


# -- clients


def _problem_of(fleet: "Fleet", client: Client) -> str:
    if client.deserted:
        return ""
    if client.over_at is None:
        return "never ended"
    if client.over_at - client.submitted_at > LIFE_S:
        return f"lived for {client.over_at - client.submitted_at:.1f} s"
    if client.error is None:
        return ""
    code = client.error.code or ""
    if code not in OUTCOMES or code == "internal_error":
        return f"no typed error: {client.error}"
    if code == "cancelled":
        return "" if client.cancelled else "cancelled by nobody"
    return "" if _is_legitimate(fleet, client, code) else f"no reason for {code}: {client.error}"


def _is_legitimate(fleet: "Fleet", client: Client, code: str) -> bool:
    begin, end = client.submitted_at, client.over_at
    assert end is not None
    is_too_much = _felt(fleet, "burst", begin - BURST_S, end) or _is_full(fleet, begin)
    if code in _OVERLOAD and is_too_much:
        return True
    has_little_time = _away_s(fleet, begin, end) > (end - begin) / 2  # it stops no queue's clock
    if code == "queue_timeout" and has_little_time and _older_ones_run(fleet, begin, end):
        return True
    troubles = _troubles(fleet, begin, end)
    if code == "no_decode_worker":
        deaf = [t.began_at for t in troubles if t.kind.startswith("router")]
        begin = min([begin, *deaf])  # who was gone then, and came back, was not heard
        troubles = [t for t in _troubles(fleet, begin, end) if _hides_workers(t)]
    if code == "worker_killer" and len({t.target for t in troubles} - {"*"}) < 3:
        return False
    if _sound_workers(fleet, client.router, troubles, begin, end):
        return False
    is_light = all(_is_light(trouble) for trouble in troubles)
    return len(troubles) > 1 or not (is_light and _others(fleet, troubles, begin, end))


def _sound_workers(
    fleet: "Fleet", router: "SimRouter", troubles: list["Trouble"], begin: float, end: float
) -> bool:
    """Whether some could have served a choice from `begin` to `end`, untouched by anything."""
    touched = {trouble.target for trouble in troubles}
    if "*" in touched or router.router_id in touched:
        return False
    return bool(_others(fleet, troubles, begin, end))


def _is_full(fleet: "Fleet", at: float) -> bool:
    """Whether what has just come would keep one worker's compute or blocks busy for most of it."""
    plan = fleet.plan
    prefill_s = block_s = 0.0
    for client in fleet.clients:
        if at - BURST_S <= client.submitted_at <= at:
            prompt, output = client.spec.num_prompt_tokens, len(client.answer.ids)
            prefill_s += prompt / plan.prefill_tokens_per_s
            block_s += (prompt + output) / fleet.model.block_size * output * plan.step_s
    return prefill_s > FULL * BURST_S or block_s > FULL * BURST_S * plan.num_blocks


def _is_light(trouble: "Trouble") -> bool:
    heavy_loss = trouble.kind == "loss" and trouble.share > LIGHT_LOSS
    return trouble.ended_at - trouble.began_at <= SHORT_S and not heavy_loss


def _hides_workers(trouble: "Trouble") -> bool:
    """Whether a router may take workers for gone: they were, or it was deaf without knowing. While
    its own bus is away a router draws no conclusions."""
    if trouble.kind in ("loss", "slow_router"):
        return trouble.ended_at - trouble.began_at > SHORT_S
    return trouble.target != "*" and not trouble.kind.startswith("router")


def _others(
    fleet: "Fleet", troubles: list["Trouble"], begin: float, end: float
) -> list["SimWorker"]:
    """Who could decode all the time and was not singled out by a trouble."""
    touched = {trouble.target for trouble in troubles}
    return [
        past.worker
        for past in fleet.past
        if past.worker.role != "prefill"
        and past.from_s + RECOVERY_S <= begin
        and end <= past.until_s
        and past.worker.incarnation not in touched
    ]


def _troubles(fleet: "Fleet", begin: float, end: float) -> list["Trouble"]:
    """Those that may have been felt meanwhile, but for the registry's: they are no excuse."""
    return [
        t
        for t in fleet.troubles
        if t.kind not in FREE_FAULTS and t.began_at <= end and begin - RECOVERY_S <= t.ended_at
    ]


def _felt(fleet: "Fleet", kind: str, begin: float, end: float) -> bool:
    return any(t.kind == kind and t.began_at <= end and begin <= t.ended_at for t in fleet.troubles)


def _away_s(fleet: "Fleet", begin: float, end: float) -> float:
    """How long of this time there was no bus."""
    outages = [t for t in fleet.troubles if t.kind == "bus_down"]
    return sum(max(0.0, min(end, t.ended_at) - max(begin, t.began_at)) for t in outages)


def _older_ones_run(fleet: "Fleet", begin: float, end: float) -> bool:
    """Whether what came before `begin` still held its blocks at the end."""
    return any(
        client.submitted_at < begin and (client.over_at is None or client.over_at > end)
        for client in fleet.clients
    )


# -- the fleet at rest


def judge_rest(fleet: "Fleet") -> list[str]:
    """Nothing is lent, reserved, fenced or in flight; no map is larger than who is there."""
    problems: list[str] = []
    for worker in fleet.lives:
        if worker.alive:
            asks = any(
                other.alive and other.name == worker.name and other is not worker
                for other in fleet.lives
            )
            rest = _rest_of_worker(worker, max_requests=int(asks))
            problems += [f"{worker.incarnation}: {text}" for text in rest]
    for router in fleet.router_lives:
        if router.alive:
            problems += [f"{router.router_id}: {text}" for text in _rest_of_router(fleet, router)]
    return problems


def _rest_of_worker(worker: "SimWorker", *, max_requests: int) -> list[str]:
    """One whose name another holds asks that one every second whether it lives."""
    engine = worker.engine
    core = engine.core
    assert core is not None
    load = core.load()
    sizes = {
        "running": load.running,
        "waiting": load.waiting,
        "lent": load.lent_blocks,
        "quarantined": load.quarantined_blocks,
        "blocks away": load.num_blocks - load.free_blocks,
        "known": len(core._known),
        "leases": core._lender.num_lent,
        "lender's keys": len(core._lender._handles) + len(core._lender._keys),
        "pulls": len(core._puller._pulls) + len(core._puller._ids),
        "live operations": sum(transfer.num_live() for transfer in engine._transfers),
        "open attempts": len(engine.delivery._open),
        "records": len(worker.service.outbox),
        "inbox": len(engine._inbox),
        "lease words": sum(
            1 for slot in range(engine.leases.num_slots) if engine.leases.read(slot)
        ),
        "mail": len(worker.service._mailer),
        "accepts": len(worker.service._accepts._due),
        "requests": max(0, len(worker.bus._requests._open) - max_requests),
    }
    engine.num_turns = 0
    core._pool.validate()
    core._lender.validate()
    core._puller.validate()
    problems = [f"{number} {what}" for what, number in sizes.items() if number]
    return problems + _rest_of_bus(worker.bus)


def _rest_of_bus(bus: SimBus) -> list[str]:
    """What this turn of the loop says has not left yet."""
    waiting = len(bus._outbound)
    return [f"{waiting} messages wait in the bus"] if waiting > AT_ONCE else []


def _rest_of_router(fleet: "Fleet", router: "SimRouter") -> list[str]:
    dispatch = router.dispatch
    tables = dispatch.scheduler._t
    dispatch.scheduler.validate()
    views = dispatch.scheduler.workers()
    sizes = {
        "choices": dispatch.num_inflight,
        "attempts": dispatch.num_attempts,
        "scheduler's choices": dispatch.scheduler.num_inflight,
        "scheduler's attempts": len(tables.attempts),
        "reservations": sum(view.num_reservations for view in views),
        "load": sum(view.tokens + view.blocks + view.running + view.prefills for view in views),
        "handles": sum(len(worker.handles) for worker in tables.fleet.workers.values()),
        "queued": dispatch.scheduler.num_queued,
        "claims": len(tables.claims),
        "mail": len(dispatch._jobs._mailer),
        "events": len(dispatch._pending),
        "requests": len(router.bus._requests._open),
    }
    problems = [f"{number} {what}" for what, number in sizes.items() if number]
    problems += _rest_of_bus(router.bus)
    present = {worker.incarnation for worker in fleet.lives if worker.alive}
    problems += [
        f"{view.info.incarnation} is not eligible: {view}" for view in views if not view.eligible
    ]
    gone = [source for source in dispatch.inbox._sources if source[1] not in present]
    if gone:
        problems.append(f"still numbers what the dead say: {gone}")
    return problems

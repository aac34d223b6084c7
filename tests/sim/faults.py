"""How each kind of fault begins and ends in a running fleet, and what record it leaves."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.plan import Fault
from tests.sim.processes import SimRouter, SimWorker

if TYPE_CHECKING:
    from tests.sim.fleet import Fleet, Trouble

FOR_EVER_S = 1e6
FREE_FAULTS = frozenset({"registry_down", "registry_frozen", "registry_empty", "burst"})


def begin(fleet: "Fleet", fault: Fault) -> None:
    """Make it happen now, if its target is there; it ends by itself after `for_s`."""
    if fleet.calm_at != float("inf"):
        return
    fleet.note(f"FAULT {fault.kind} {fault.target} for {fault.for_s} share {fault.share}")
    if fault.target.startswith("r"):
        router = fleet.routers[fault.target]
        if router.alive:
            _on_router(fleet, fault, router)
    elif fault.target:
        worker = fleet.workers[fault.target]
        if worker.alive:
            _on_worker(fleet, fault, worker)
    else:
        _on_fleet(fleet, fault)


def end_all(fleet: "Fleet") -> None:
    """Whatever still goes on ends; but who is dead or stands still for ever stays so for now: that
    must keep no choice from ending."""
    if not fleet.hub.is_up:
        fleet.hub.bring_up()
    fleet.hub.loss = 0.0
    fleet.hub.slow.clear()
    fleet.fabric.flaky, fleet.fabric.hangs = 0.0, False
    if fleet.server.is_down:
        fleet.server.start()
    fleet.server.thaw()
    for worker in fleet.lives:
        worker.engine.runner.fails_next = False
        for endpoint in fleet.fabric.of(worker.process):
            endpoint.apart = False
    for router in list(fleet.routers.values()):
        if router.process.frozen:
            router.process.thaw()
    for name, router in list(fleet.routers.items()):
        if not router.alive:
            fleet.start_router(name)
    now = fleet.loop.time()
    for trouble in fleet.troubles:
        trouble.ended_at = min(trouble.ended_at, now)


def replace_dead(fleet: "Fleet") -> None:
    """Who stands still for ever is killed; every worker lives again."""
    for worker in list(fleet.lives):
        stands_still = worker.process.frozen or worker.engine.hung_until > fleet.loop.time()
        if worker.alive and stands_still:
            worker.end("killed, since it stood still")
    for name in fleet.plan.names():
        restart(fleet, name)


def restart(fleet: "Fleet", name: str) -> None:
    """A new life, unless one lives."""
    if not fleet.over and not any(one.name == name and one.alive for one in fleet.lives):
        fleet.start_worker(name)


def _trouble(fleet: "Fleet", fault: Fault, target: str) -> "Trouble":
    from tests.sim.fleet import Trouble

    trouble = Trouble(fault.kind, target, fleet.loop.time(), share=fault.share)
    fleet.troubles.append(trouble)
    return trouble


def _lasts(fleet: "Fleet", fault: Fault, target: str, undo: Callable[[], object]) -> None:
    """Trouble until `for_s` has passed, then `undo`."""
    trouble = _trouble(fleet, fault, target)

    def over() -> None:
        fleet.note(f"FAULT {fault.kind} {fault.target} is over")
        trouble.ended_at = min(trouble.ended_at, fleet.loop.time())
        undo()

    fleet.later(fault.for_s, over)


def _on_worker(fleet: "Fleet", fault: Fault, worker: SimWorker) -> None:
    target, process = worker.incarnation, worker.process
    match fault.kind:
        case "crash":
            _trouble(fleet, fault, target).ended_at = fleet.loop.time()
            worker.end("crashed")
            if fault.for_s:
                fleet.later(fault.for_s, lambda: restart(fleet, worker.name))
        case "freeze":
            process.freeze()
            if fault.for_s:
                _lasts(fleet, fault, target, process.thaw)
            else:
                _trouble(fleet, fault, target)
        case "engine_hangs":
            hangs_s = fault.for_s or FOR_EVER_S
            worker.engine.hang(fleet.loop.time() + hangs_s)
            trouble = _trouble(fleet, fault, target)
            if fault.for_s:
                trouble.ended_at = fleet.loop.time() + hangs_s
        case "cut_bus":
            fleet.hub.cut_off(process)
            _lasts(fleet, fault, target, lambda: fleet.hub.mend(process))
        case "cut_peers":
            endpoints = fleet.fabric.of(process)
            for endpoint in endpoints:
                endpoint.apart = True
            _lasts(fleet, fault, target, lambda: _together(endpoints))
        case "cut_registry":
            worker.registry.store.cut()
            _lasts(fleet, fault, target, worker.registry.store.mend)
        case "step_fails":
            _trouble(fleet, fault, target)  # until it has work, fails, and exits
            worker.engine.runner.fails_next = True
        case "drain":
            _trouble(fleet, fault, target).ended_at = fleet.loop.time()
            fleet.useless(worker)
            worker.leave()
            fleet.later(fault.for_s + 10.0, lambda: restart(fleet, worker.name))
        case "twin":
            fleet.start_worker(worker.name)
        case "slow_worker":
            fleet.hub.slow[target] = fault.share
            _lasts(fleet, fault, target, lambda: fleet.hub.slow.pop(target, None))
        case _:
            raise AssertionError(fault)


def _together(endpoints: list) -> None:  # type: ignore[type-arg]
    for endpoint in endpoints:
        endpoint.apart = False


def _on_router(fleet: "Fleet", fault: Fault, router: SimRouter) -> None:
    target, process = router.router_id, router.process
    match fault.kind:
        case "router_crash":
            _trouble(fleet, fault, target).ended_at = fleet.loop.time()
            router.end()
            fleet.later(fault.for_s, lambda: _again(fleet, router))
        case "router_freeze":
            process.freeze()
            _lasts(fleet, fault, target, process.thaw)
        case "router_cut_bus":
            fleet.hub.cut_off(process)
            _lasts(fleet, fault, target, lambda: fleet.hub.mend(process))
        case "slow_router":
            fleet.hub.slow[target] = fault.share
            _lasts(fleet, fault, target, lambda: fleet.hub.slow.pop(target, None))
        case _:
            raise AssertionError(fault)


def _again(fleet: "Fleet", router: SimRouter) -> None:
    if not fleet.over and fleet.routers[router.name] is router:
        fleet.start_router(router.name)


def _on_fleet(fleet: "Fleet", fault: Fault) -> None:
    hub, fabric, server = fleet.hub, fleet.fabric, fleet.server
    match fault.kind:
        case "bus_down":
            hub.take_down()
            _lasts(fleet, fault, "*", hub.bring_up)
        case "registry_down":
            server.kill()
            _lasts(fleet, fault, "*", server.start)
        case "registry_frozen":
            server.freeze()
            _lasts(fleet, fault, "*", server.thaw)
        case "registry_empty":
            server.kill()
            server.empty()
            _lasts(fleet, fault, "*", server.start)
        case "loss":
            hub.loss = fault.share
            _lasts(fleet, fault, "*", lambda: setattr(hub, "loss", 0.0))
        case "flaky_transfers":
            fabric.flaky = fault.share
            _lasts(fleet, fault, "*", lambda: setattr(fabric, "flaky", 0.0))
        case "hanging_transfers":
            fabric.hangs = True
            _lasts(fleet, fault, "*", lambda: setattr(fabric, "hangs", False))
        case "burst":
            _lasts(fleet, fault, "*", lambda: None)
        case _:
            raise AssertionError(fault)

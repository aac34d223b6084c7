"""Runs one plan from beginning to end, and says what was wrong."""

import gc
import logging
from collections import Counter
from dataclasses import dataclass, field

from tests.sim import oracles
from tests.sim.fleet import Fleet, Record
from tests.sim.loop import SimLoop
from tests.sim.plan import Plan, make_plan, without
from tests.sim.thrift import judge_thrift

LOGGERS = ("baton", "discovery", "asyncio")


@dataclass
class Result:
    plan: Plan
    problems: list[str]
    record: Record
    num_choices: int = 0
    num_completed: int = 0
    virtual_s: float = 0.0
    num_callbacks: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    stories: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return self.record.digest.hexdigest()


class _Defects(logging.Handler):
    """What the product itself calls a defect: nothing may be logged as an error."""

    def __init__(self, record: Record, loop: SimLoop) -> None:
        super().__init__(logging.INFO if record.keeps is None else logging.ERROR)
        self._record, self._loop = record, loop
        self.found: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        text = entry.getMessage()
        self._record.note(self._loop.time(), f"LOG {entry.name}: {text}")
        if entry.levelno == logging.ERROR:
            cause = f": {entry.exc_info[1]!r}" if entry.exc_info else ""
            self.found.append(f"logged: {text}{cause}")


def run_plan(plan: Plan, *, trace: bool = False) -> Result:
    """Deterministic: the same plan gives the same result, to the byte."""
    loop = SimLoop()
    record = Record(keeps=None if trace else 400)
    result = Result(plan, [], record)
    defects = _Defects(record, loop)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(one.level, one.propagate) for one in loggers]
    for logger in loggers:
        logger.addHandler(defects)
        logger.setLevel(defects.level)
        logger.propagate = False
    try:
        loop.run_until_complete(_run(loop, result))
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(defects)
            logger.setLevel(level)
            logger.propagate = propagate
        _unwind(loop)
    said = defects.found + loop.failures
    result.problems[:0] = [text for text in said if not oracles.is_expected(text)]
    result.num_callbacks = loop.num_run
    return result


def _unwind(loop: SimLoop) -> None:
    """Silently: what the dead say while their coroutines are closed is nobody's."""
    logging.disable(logging.CRITICAL)
    try:
        loop.unwind()
    finally:
        logging.disable(logging.NOTSET)
        loop.close()


async def _run(loop: SimLoop, result: Result) -> None:
    fleet = Fleet(loop, result.plan, result.record)
    began = loop.time()
    try:
        await fleet.run()
        result.problems += oracles.judge(fleet) + judge_thrift(fleet)
        if not result.problems:
            result.problems += oracles.judge_probes(fleet, await fleet.probe())
    except AssertionError as error:
        result.problems.append(str(error))
        result.problems += oracles.judge_clients(fleet)
    finally:
        if result.problems:
            result.stories = oracles.stories(fleet)
        fleet.close()
    result.virtual_s = loop.time() - began
    result.num_choices = len(fleet.clients)
    result.num_completed = sum(c.over_at is not None and c.error is None for c in fleet.clients)
    codes = [client.error.code or "?" for client in fleet.clients if client.error is not None]
    result.errors = dict(Counter(codes))


def run_seed(seed: int, *, trace: bool = False) -> Result:
    return run_plan(make_plan(seed), trace=trace)


def told(result: Result, *, lines: int | None = 60) -> str:
    """The seed, its plan, the last events, the stories of those who were harmed, what was wrong."""
    plan = result.plan
    text = [
        f"seed {plan.seed}: {', '.join(plan.roles)}; {plan.num_routers} routers; {plan.transfers}; "
        f"{len(plan.requests)} requests",
        *(f"    {fault}" for fault in plan.faults),
        *list(result.record.lines)[-lines if lines else 0 :],
        *result.stories,
        *(f"seed {plan.seed} PROBLEM: {problem}" for problem in result.problems),
        f"again: python -m tests.sim --seed {plan.seed} [--trace] [--shrink]",
    ]
    return "\n".join(text)


def shrink(plan: Plan) -> Plan:
    """The same plan with as few faults as still fail."""
    for fault in list(plan.faults):
        smaller = without(plan, fault)
        if run_plan(smaller).problems:
            plan = smaller
    return plan


def collect() -> None:
    """Dead fleets are cycles: let go of them between seeds."""
    gc.collect()

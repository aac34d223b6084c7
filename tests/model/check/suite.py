"""Which scopes are looked at, and what one run of a scope says."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tests.model.check.explore import Explorer, Found
from tests.model.check.liveness import why_not_live
from tests.model.check.mutants import Mutant
from tests.model.check.scopes import Scope
from tests.model.check.story import told

AUDITED = 2000
"""States of each scope whose canonical form is checked against what follows from it."""


@dataclass(frozen=True)
class Result:
    """What came of one scope, without what led to it: travels between processes."""

    name: str
    num_states: int
    num_transitions: int
    num_audited: int
    num_faults: int
    depth: int
    seconds: float
    exhausted: bool
    violation: str
    story: str

    def line(self) -> str:
        extent = f"all with < {self.num_faults} faults" if self.num_faults else "some without fault"
        extent = "all of it" if self.exhausted else extent
        verdict = "VIOLATED" if self.violation else "holds"
        return (
            f"{self.name:<44} {self.num_states:>9} states {self.num_transitions:>9} transitions "
            f"depth {self.depth:>3} {self.seconds:>7.1f} s  {extent:<19} "
            f"{self.num_audited:>5} audited  {verdict}"
        )


def check(scope: Scope, max_states: int, *, audited: int = AUDITED) -> Result:
    """Explore, then ask whether everything ends once faults stop."""
    explorer = Explorer(scope, audited=audited)
    with Quiet():
        found = explorer.run(max_states=max_states)
        if not found.violation:
            found.violation = why_not_live(explorer)
    return _result(scope.name, explorer, found)


def hunt(mutant: Mutant) -> Result:
    """The same with a planted mistake; not audited, and its scope is small."""
    with ExitStack() as planted:
        for patch in mutant.patches():
            planted.enter_context(patch)
        return replace(check(mutant.scope, mutant.max_states, audited=0), name=mutant.name)


def _result(name: str, explorer: Explorer, found: Found) -> Result:
    story = told(explorer.fleet, found.story, found.violation) if found.violation else ""
    return Result(
        name, found.num_states, found.num_transitions, found.num_audited, found.num_faults,
        found.depth, found.seconds, found.exhausted, found.violation, story,
    )  # fmt: skip


class Quiet(ExitStack):
    """What the machines log about the faults that are played is not news."""

    def __enter__(self) -> "Quiet":
        logger = logging.getLogger("baton")
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        self.callback(logger.setLevel, level)
        return self

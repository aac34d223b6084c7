"""`make model`: looks at every scope, and prints a line for each.

python -m tests.model.check [--states N] [--scope NAME] [--mutants] [--processes N]
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import get_context

from tests.model.check.mutants import MUTANTS
from tests.model.check.scopes import BIG, SMALL
from tests.model.check.suite import Result, check, hunt

DEFAULT_STATES = 20_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="make model", description=__doc__)
    parser.add_argument("--states", type=int, default=DEFAULT_STATES, help="bound of each scope")
    parser.add_argument("--scope", default="", help="only those with this in their name")
    parser.add_argument("--mutants", action="store_true", help="also the planted mistakes")
    parser.add_argument("--processes", type=int, default=0, help="0: two for a long run, else one")
    options = parser.parse_args()
    scopes = [scope for scope in (*SMALL, BIG) if options.scope in scope.name]
    processes = options.processes or 1 + (options.states > DEFAULT_STATES)
    jobs: list[Callable[[], Result]] = [partial(check, one, options.states) for one in scopes]
    failed = _run(jobs, processes, wanted=False)
    if options.mutants:
        mutants = [partial(hunt, mutant) for mutant in MUTANTS if options.scope in mutant.name]
        scopes += [mutant.scope for mutant in MUTANTS if options.scope in mutant.name]
        failed += _run(mutants, processes, wanted=True)
    return 1 if failed or not scopes else 0


def _run(jobs: list[Callable[[], Result]], processes: int, *, wanted: bool) -> int:
    """How many went otherwise than wanted: a violation where there should be none, or none."""
    failed = total = 0
    for result in _results(jobs, processes):
        print(result.line(), flush=True)
        total += result.num_states
        if bool(result.violation) is not wanted:
            failed += 1
            print(result.story or "  not found", flush=True)
        elif wanted:
            print(f"    found: {result.violation}", flush=True)
    print(f"{total} states; {failed} not as they should be", flush=True)
    return failed


def _results(jobs: list[Callable[[], Result]], processes: int) -> Iterable[Result]:
    if processes < 2:
        yield from (job() for job in jobs)
        return
    _JOBS[:] = jobs  # a forked process has them; patches of mutants cannot travel
    with get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_call, range(len(jobs)))


_JOBS: list[Callable[[], Result]] = []


def _call(number: int) -> Result:
    return _JOBS[number]()


if __name__ == "__main__":
    sys.exit(main())

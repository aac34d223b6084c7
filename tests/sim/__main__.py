"""`python -m tests.sim`: many seeds, one of them in full, or the planted bugs."""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.sim.mutants import MUTANTS, hunt
from tests.sim.plan import make_plan
from tests.sim.run import collect, run_plan, run_seed, shrink, told

AT_ONCE = 20
SAY_EVERY = 25
"""So many batches."""

Batch = tuple[int, int, int, float, dict[str, int], list[int], list[str]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="print everything (with --seed)")
    parser.add_argument("--shrink", action="store_true", help="drop faults that are not needed")
    parser.add_argument("--mutants", action="store_true", help="which seed finds each planted bug")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    if options.mutants:
        return find_mutants(seeds)
    if options.seed is None:
        return many(seeds, options.jobs)
    result = run_seed(options.seed, trace=options.trace)
    if options.shrink and result.problems:
        result = run_plan(shrink(make_plan(options.seed)), trace=options.trace)
    print(told(result, lines=None if options.trace else 60))
    print(f"digest {result.digest} errors {result.errors} callbacks {result.num_callbacks}")
    return bool(result.problems)


def many(seeds: range, jobs: int) -> int:
    """Says which failed and why, and in the end what was done."""
    began = time.perf_counter()
    batches = [seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE)]
    choices = completed = routed = 0
    virtual_s = 0.0
    errors: Counter[str] = Counter()
    failed: list[int] = []
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(run_batch, batches) if jobs > 1 else map(run_batch, batches)
        for number, batch in enumerate(results):
            choices, completed, routed = choices + batch[0], completed + batch[1], routed + batch[2]
            virtual_s += batch[3]
            errors.update(batch[4])
            failed += batch[5]
            for text in batch[6]:
                print(text, flush=True)
            if not number % SAY_EVERY:
                print(f"seed {batches[number][-1]}, {len(failed)} failed", file=sys.stderr)
    print(
        f"{len(seeds)} seeds, {choices} choices, {completed} completed, errors {dict(errors)}, "
        f"{routed} callbacks, {virtual_s / 3600:.1f} virtual hours in "
        f"{time.perf_counter() - began:.0f} s; failed: {failed or 'none'}"
    )
    return bool(failed)


def run_batch(seeds: range) -> Batch:
    results = [run_seed(seed) for seed in seeds]
    collect()
    errors: Counter[str] = Counter()
    for result in results:
        errors.update(result.errors)
    bad = [result for result in results if result.problems]
    return (
        sum(result.num_choices for result in results),
        sum(result.num_completed for result in results),
        sum(result.num_callbacks for result in results),
        sum(result.virtual_s for result in results),
        dict(errors),
        [result.plan.seed for result in bad],
        [told(result, lines=12) for result in bad],
    )


def find_mutants(seeds: range) -> int:
    missed = 0
    for name in MUTANTS:
        found = hunt(name, seeds)
        missed += found is None
        how = f"seed {found.plan.seed}: {found.problems[0][:120]}" if found else "NOT FOUND"
        print(f"{name:26} {how}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())

"""Whole fleets in virtual time with random faults; `make sim` runs more of the same seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutants import FOUND_BY, MUTANTS, hunt
from tests.sim.plan import make_plan
from tests.sim.run import collect, run_seed, told

NUM_SEEDS = 240
AT_ONCE = 10
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, AT_ONCE))
def test_nobody_is_harmed_by_what_must_harm_nobody(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        result = run_seed(seed)
        assert not result.problems, told(result)
    collect()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    """First by the seed that is known to find it, else by any that the tests run."""
    known = FOUND_BY[name]
    found = hunt(name, range(known, known + 1)) or hunt(name, range(NUM_SEEDS))
    assert found is not None


def test_a_seed_is_the_same_run_to_the_byte() -> None:
    """Also in another process, whose sets and dicts have other hashes."""
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "13"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.splitlines()[-1])
    assert len(digests) == 1
    assert next(iter(digests)).startswith("digest ")


def test_seeds_differ_and_their_plans_do_not_change() -> None:
    assert make_plan(7) == make_plan(7)
    assert run_seed(1).digest != run_seed(3).digest

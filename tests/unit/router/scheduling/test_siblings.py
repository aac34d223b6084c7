"""Choices of one prompt share its prefill while that is the cheapest."""

import pytest

from protocol.errors import LocalError
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.siblings import Siblings
from tests.unit.router.scheduling.bench import BLOCK, Bench, handle, info, only, submitted


def prefills(bench: Bench, count: int, *, tokens: int = 1000, name: str = "r") -> list[str]:
    """Submit siblings; the workers that their prefills went to."""
    found = []
    for n in range(count):
        event = submitted(f"{name}/{n}", tokens=tokens, siblings=name)
        found.append(only(bench.feed(event), cmd.StartPrefill).worker)
    return found


def fleet(num_prefill: int = 4, num_decode: int = 4) -> Bench:
    bench = Bench()
    bench.list_workers(
        *(info(f"p{n}", "prefill", running=8) for n in range(num_prefill)),
        *(info(f"d{n}", "decode") for n in range(num_decode)),
    )
    return bench


def test_siblings_go_to_one_prefill_worker_and_are_charged_a_block() -> None:
    bench = fleet()
    [worker] = set(prefills(bench, 8))
    [view] = [view for view in bench.scheduler.workers() if view.info.worker_id == worker]
    assert view.tokens == 1000 + 7 * (1000 - 999 // BLOCK * BLOCK)
    assert view.prefills == 8


def test_strangers_with_the_same_prompt_do_not() -> None:
    bench = fleet()
    workers = {
        only(bench.feed(submitted(f"c{n}/0", tokens=1000)), cmd.StartPrefill).worker
        for n in range(4)
    }
    assert len(workers) == 4


def test_requests_are_told_apart() -> None:
    bench = fleet()
    [one] = set(prefills(bench, 3, name="r"))
    [other] = set(prefills(bench, 3, name="s"))
    assert one != other


def test_a_worker_that_is_found_in_a_large_fleet() -> None:
    """Where candidates are a few samples."""
    bench = fleet(num_prefill=64, num_decode=8)
    assert len(set(prefills(bench, 12))) == 1


def test_much_other_work_there_is_worth_a_second_prefill() -> None:
    bench = fleet(num_prefill=2)
    [place, *_] = prefills(bench, 1)
    other = "p1" if place == "p0" else "p0"
    for n in range(3):  # what others queue behind our own prefill
        event = submitted(f"x{n}/0", tokens=4000)
        bench.feed(event)
    views = {view.info.worker_id: view.tokens for view in bench.scheduler.workers()}
    assert views[place] - 1000 < views[other]  # our own work is not in our way
    second = submitted("r/1", tokens=1000, siblings="r")
    assert only(bench.feed(second), cmd.StartPrefill).worker == place


def test_the_prompt_stays_there_once_it_is_computed() -> None:
    bench = fleet()
    [place] = prefills(bench, 1)
    bench.feed(ev.Prefilled(1, handle(place), ended=False))
    third = submitted("r/2", tokens=1000, siblings="r")
    assert only(bench.feed(third), cmd.StartPrefill).worker == place


def test_a_full_worker_hands_the_rest_to_the_next_one() -> None:
    bench = Bench()
    bench.list_workers(
        *(info(f"p{n}", "prefill", running=2) for n in range(3)),
        *(info(f"d{n}", "decode", running=50) for n in range(2)),
    )
    workers = prefills(bench, 8)
    assert len(set(workers[:4])) == 1
    assert len(set(workers[4:])) == 1
    assert workers[0] != workers[4]


def test_a_worker_that_died_is_replaced_for_all() -> None:
    bench = fleet()
    [place] = prefills(bench, 1)
    bench.feed(ev.WorkerUnlisted(place, f"{place}-1"))
    out = bench.feed(ev.WorkerLeaving(place, f"{place}-1"))
    out += bench.feed(ev.AttemptFailed(1, "prefill", "aborted", "bye"))
    again = only(out, cmd.StartPrefill).worker
    assert again != place
    second = submitted("r/1", tokens=1000, siblings="r")
    assert only(bench.feed(second), cmd.StartPrefill).worker == again


def test_a_prefill_that_failed_has_left_nothing_to_share() -> None:
    bench = fleet(num_prefill=2)
    [place, _] = prefills(bench, 2)
    siblings = bench.scheduler._t.siblings
    first = siblings.place_of("r")
    assert first is not None
    again = only(bench.feed(ev.AttemptFailed(1, "prefill", "engine", "why")), cmd.StartPrefill)
    assert again.worker != place
    assert siblings.place_of("r") is not first
    third = submitted("r/2", tokens=1000, siblings="r")
    assert only(bench.feed(third), cmd.StartPrefill).worker == again.worker


def test_a_prefill_that_ended_unfinished_is_no_place() -> None:
    bench = fleet(num_prefill=1)
    prefills(bench, 2)
    siblings = bench.scheduler._t.siblings
    assert siblings.place_of("r") is not None
    bench.feed(ev.ClientGone("r/0"))
    assert siblings.place_of("r") is None  # the other one computes it now, charged a block
    assert len(siblings) == 1


def test_decode_workers_that_prefill_share_too() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"d{n}", "decode") for n in range(3)))
    starts = [
        only(bench.feed(submitted(f"r/{n}", tokens=2000, siblings="r")), cmd.StartDecode).worker
        for n in range(5)
    ]
    assert len(set(starts)) == 1


def test_workers_of_both_roles_share_too() -> None:
    bench = Bench()
    bench.list_workers(*(info(f"b{n}") for n in range(3)))
    starts = [
        only(bench.feed(submitted(f"r/{n}", tokens=2000, siblings="r")), cmd.StartDecode).worker
        for n in range(5)
    ]
    assert len(set(starts)) == 1


def test_the_map_ends_with_its_choices() -> None:
    bench = fleet()
    prefills(bench, 3)
    tables = bench.scheduler._t
    assert len(tables.siblings) == 1
    for n in range(3):
        assert len(tables.siblings) == 1
        bench.feed(ev.ClientGone(f"r/{n}"))
    assert len(tables.siblings) == 0


def test_validate_sees_an_entry_that_nobody_has() -> None:
    siblings = Siblings()
    siblings.join("a")
    siblings.join("")
    siblings.validate(["a", ""])
    with pytest.raises(LocalError):
        siblings.validate([])
    with pytest.raises(LocalError):
        siblings.validate(["a", "a"])
    siblings.leave("a")
    siblings.leave("")
    siblings.validate([""])

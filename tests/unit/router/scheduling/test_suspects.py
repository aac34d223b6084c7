"""Choices that may be killing workers: who runs alone first, for how long, and who is let off."""

from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.alone import PATIENCE_S, PROBATION_S
from tests.unit.router.scheduling.bench import Bench, ends, info, only, report, submitted


def starts(commands: list[cmd.Command]) -> dict[str, int]:
    """Attempts by choice."""
    return {c.choice: c.attempt for c in commands if isinstance(c, cmd.StartDecode)}


def replace(bench: Bench, worker: str, number: int) -> list[cmd.Command]:
    """The process died and has a successor that reports."""
    fresh = info(worker, "decode", incarnation=f"{worker}-{number}", running=32)
    bench.incarnations[worker] = fresh.incarnation
    out = bench.feed(ev.WorkerListed(fresh))
    return out + bench.feed(ev.WorkerReported(worker, fresh.incarnation, report()))


def decode(bench: Bench, attempts: dict[str, int], tokens: dict[str, int]) -> None:
    """They flow, and get so many tokens more."""
    for choice, attempt in attempts.items():
        bench.feed(ev.DecodingStarted(attempt))
        bench.heard[attempt] = bench.now + 1000.0
        bench.output[choice] = bench.output.get(choice, 0) + tokens[choice]


def suspects(bench: Bench, tokens: dict[str, int]) -> list[cmd.Command]:
    """The worker `a` dies twice under all of them. What the third incarnation is given."""
    out: list[cmd.Command] = []
    for choice in tokens:
        out += bench.feed(submitted(choice))
    for number in (2, 3):
        begun = starts(out)
        assert set(begun) == set(tokens)
        decode(bench, begun, tokens)
        out = replace(bench, "a", number)
    return out


def test_who_got_the_fewest_tokens_out_of_the_dead_is_tried_first() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    out = suspects(bench, {"some": 40, "none": 0, "many": 90})
    assert list(starts(out)) == ["none"]


def test_tokens_from_before_a_death_do_not_count_for_the_next() -> None:
    """A long stream that was resumed and died at once is as suspect as a new one."""
    bench = Bench()
    bench.list_workers(info("a", "decode"), info("b", "decode", running=1))
    out = bench.feed(submitted("long")) + bench.feed(submitted("brief"))
    begun = starts(out)
    decode(bench, begun, {"long": 1000, "brief": 3})
    choice = bench.scheduler._t.choices["long"]
    assert choice.tries.begun_at == 0
    worker = choice.decode.worker.id if choice.decode else ""
    out = replace(bench, worker, 2)
    decode(bench, {"long": starts(out)["long"]}, {"long": 1})
    worker = choice.decode.worker.id if choice.decode else ""
    replace(bench, worker, 3)
    assert choice.tries.tokens_under_deaths == 1001


def test_the_next_suspect_starts_when_the_first_has_been_harmless_for_a_while() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    first = starts(suspects(bench, {"one": 0, "two": 5, "three": 9}))
    bench.feed(ev.Accepted(first["one"]))
    assert starts(bench.pass_time(PROBATION_S * 1.5)) == {}, "it only computes its prompt yet"
    decode(bench, first, {"one": 10})
    out = bench.pass_time(PROBATION_S)
    assert starts(out) == {}, "the next one hopes for an empty worker"
    out = bench.pass_time(PATIENCE_S)
    assert list(starts(out)) == ["two"]
    decode(bench, starts(out), {"two": 1})
    assert starts(bench.pass_time(PROBATION_S)) == {}, "and so does the third"
    assert list(starts(bench.pass_time(PATIENCE_S))) == ["three"]


def test_when_the_killer_is_known_the_others_go_on_together_at_once() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    first = starts(suspects(bench, {"evil": 0, "one": 5, "two": 9}))
    decode(bench, first, {"evil": 1})
    out = replace(bench, "a", 4)
    assert ends(out) == [("failed", "decode", "worker_killer")]
    assert set(starts(out)) == {"one", "two"}
    decode(bench, starts(out), {"one": 1, "two": 1})
    assert set(starts(replace(bench, "a", 5))) == {"one", "two"}, "one death each is no suspicion"
    assert bench.scheduler._t.claims == {}


def test_who_was_harmless_alone_and_unlucky_in_company_is_not_the_killer() -> None:
    """Its first worker died of something else, the next two of the deadly prompt beside it."""
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    begun = starts(bench.feed(submitted("old")))
    decode(bench, begun, {"old": 1})
    begun = starts(replace(bench, "a", 2)) | starts(bench.feed(submitted("evil")))
    decode(bench, begun, {"old": 50, "evil": 0})
    begun = starts(replace(bench, "a", 3))
    assert list(begun) == ["old"]
    decode(bench, begun, {"old": 50})
    begun = starts(bench.pass_time(PROBATION_S))
    assert list(begun) == ["evil"]
    decode(bench, begun, {"evil": 0})
    out = replace(bench, "a", 4)
    tries = bench.scheduler._t.choices["old"].tries
    assert ends(out) == []
    assert (tries.deaths, list(starts(out))) == (["a-1", "a-2", "a-3"], ["evil"])
    decode(bench, starts(out), {"evil": 0})
    out = replace(bench, "a", 5)
    assert ends(out) == [("failed", "decode", "worker_killer")]
    assert (tries.deaths, list(starts(out))) == (["a-1"], ["old"])


def test_a_dead_worker_that_nobody_misses_yet_does_not_prove_its_suspect_harmless() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    first = starts(suspects(bench, {"evil": 0}))
    decode(bench, first, {"evil": 1})
    bench.heard[first["evil"]] = bench.now + PROBATION_S / 2
    bench.pass_time(2 * PROBATION_S)
    assert list(bench.scheduler._t.claims) == ["evil"]
    assert ends(replace(bench, "a", 4)) == [("failed", "decode", "worker_killer")]


def test_a_slow_killer_is_found_in_the_end() -> None:
    """It is harmless for longer than the probation, each time."""
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    out = suspects(bench, {"slow": 500})
    decode(bench, starts(out), {"slow": 500})
    bench.pass_time(PROBATION_S)
    out = replace(bench, "a", 4)
    decode(bench, starts(out), {"slow": 500})
    bench.pass_time(PROBATION_S)
    assert ends(replace(bench, "a", 5)) == [("failed", "decode", "worker_killer")]


def test_a_worker_that_only_seemed_dead_is_held_against_nobody_twice() -> None:
    """Two processes under one name take the registration from each other, again and again."""
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    begun = starts(bench.feed(submitted("calm")))
    for number in (2, 1, 2, 1):
        decode(bench, begun, {"calm": 40})
        out = replace(bench, "a", number)
        assert ends(out) == []
        begun = starts(out)
    assert bench.scheduler._t.choices["calm"].tries.deaths == ["a-1", "a-2"]


def test_a_process_that_is_heard_again_was_killed_by_nobody() -> None:
    """A pause of the workers' side of the network must not make suspects of all streams."""
    bench = Bench()
    bench.list_workers(info("a", "decode"), info("b", "decode"))
    silence_s = bench.scheduler._t.limits.silence_timeout_s
    out = bench.feed(submitted("calm"))
    tries = bench.scheduler._t.choices["calm"].tries
    for _ in range(5):
        start = only(out, cmd.StartDecode)
        decode(bench, {"calm": start.attempt}, {"calm": 100})
        out = bench.pass_time(silence_s + 0.1, start.worker)
        assert tries.deaths == [f"{start.worker}-1"]
        bench.feed(ev.Accepted(only(out, cmd.StartDecode).attempt))
        assert ends(bench.pass_time(3.0)) == []
        assert tries.deaths == []


def test_when_some_suspects_were_harmless_those_that_wait_go_on_in_company() -> None:
    """Two machines failed, and nobody is to blame: sixty streams do not wait for a minute."""
    bench = Bench()
    bench.list_workers(info("a", "decode", running=32))
    out = suspects(bench, {f"c{n:02}": n for n in range(20)})
    going: set[str] = set()
    for _ in range(3):
        assert len(starts(out)) == 1
        decode(bench, starts(out), dict.fromkeys(starts(out), 1))
        going |= starts(out).keys()
        out = bench.pass_time(PROBATION_S)
        out += bench.pass_time(PATIENCE_S) if not starts(out) else []
    assert len(starts(out)) == 17
    assert not going & starts(out).keys()
    begun = starts(out)
    decode(bench, begun, dict.fromkeys(begun, 1))
    assert len(starts(replace(bench, "a", 4))) == 1, "once, for each"


def test_who_waits_for_an_empty_worker_does_not_wait_for_ever() -> None:
    """The stream that is there may last for hours. Nothing new comes to it meanwhile."""
    bench = Bench()
    bench.list_workers(info("b", "decode"))
    calm = starts(bench.feed(submitted("calm")))
    decode(bench, calm, {"calm": 1})
    bench.list_workers(info("a", "decode"), info("c", "decode"))
    silence_s = bench.scheduler._t.limits.silence_timeout_s
    out = bench.feed(submitted("evil"))
    for _ in range(2):
        start = only(out, cmd.StartDecode)
        decode(bench, {"evil": start.attempt}, {"evil": 0})
        del bench.incarnations[start.worker]
        out = bench.pass_time(silence_s + 0.1)
    assert starts(out) == {}
    claims = bench.scheduler._t.claims
    assert [worker.id for worker in claims.values()] == ["b"]
    assert bench.feed(submitted("late")) == []
    assert list(starts(bench.pass_time(PATIENCE_S))) == ["evil"]
    attempt = only(list(bench.scheduler._t.attempts.values())[-1:], object)
    decode(bench, {"evil": attempt.id}, {"evil": 1})
    assert list(starts(bench.pass_time(PROBATION_S))) == ["late"]


def test_a_client_that_leaves_gives_its_claim_and_its_timer_back() -> None:
    bench = Bench()
    bench.list_workers(info("a", "decode"))
    suspects(bench, {"one": 0, "two": 5})
    bench.feed(ev.ClientGone("one"))
    worker = bench.scheduler._t.fleet.workers["a"]
    assert bench.scheduler._t.claims == {"two": worker}
    bench.feed(ev.ClientGone("two"))
    assert (worker.claim, worker.claim_is_due, worker.claim_timer.due) == ("", False, None)

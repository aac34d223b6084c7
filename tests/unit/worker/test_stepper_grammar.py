"""Answers that obey a schema, on every leg of a whole engine."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from protocol.sampling import Sampling
from tests.unit.worker.engine_world import SMALL, World, hand_over, prompt_of, running, text_of
from worker.engine import grammar_desk
from worker.engine.base import DecodeJob
from worker.engine.grammar import GrammarCompiler, GrammarError, GrammarState

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2},
            "size": {"type": "integer"},
        },
        "required": ["name", "tags", "size"],
        "additionalProperties": False,
    }
)
OBEYING = Sampling(max_tokens=200, temperature=0.9, seed=3, grammar=SCHEMA)


def check(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "tags", "size"]
    assert set(found["tags"]) <= {"red", "green"}
    assert len(found["tags"]) >= 2
    assert isinstance(found["size"], int)


async def test_local_answer_obeys_and_stops() -> None:
    async with running() as world:
        ended = await world.over(world.decode(prompt_of(9), OBEYING))
        check(ended.text)
        assert (ended.finish, ended.deltas[-1].stop) == ("stop", None)
        assert not set(ended.ids) & world.runner.eos_ids
        ends = await world.over(
            world.decode(prompt_of(9), Sampling(max_tokens=50, grammar='{"type":"number"}'))
        )
        assert ends.finish == "stop"
        assert ends.ids[-1] in world.runner.eos_ids
        float(ends.text)


async def test_first_token_of_one_worker_and_the_rest_of_another() -> None:
    async with running() as source, running(worker="d") as target:
        alone = await target.over(target.decode(prompt_of(30), OBEYING))
        result, ended = await hand_over(source, target, prompt_of(30), OBEYING)
        assert result.first is not None
        assert result.first.ids + ended.ids == alone.ids
        check(result.first.text + ended.text)


async def test_resume_anywhere_goes_on_with_the_same_tokens() -> None:
    async with running() as world:
        whole = await world.over(world.decode(prompt_of(9), OBEYING))
        for count in range(1, len(whole.ids)):
            given = whole.ids[:count]
            key = world.decode(
                prompt_of(9), OBEYING, output_ids=given, chars_sent=len(text_of(given))
            )
            assert (await world.over(key)).ids == whole.ids[count:]


async def test_whole_answer_that_is_given_ends_at_once() -> None:
    async with running() as world:
        whole = await world.over(world.decode(prompt_of(9), OBEYING))
        rest = {"output_ids": whole.ids, "chars_sent": len(whole.text)}
        ended = await world.over(world.decode(prompt_of(9), OBEYING, **rest))
        assert (ended.ids, ended.text, ended.finish) == ([], "", "stop")
        prefilled = (await world.over(world.prefill(prompt_of(9), OBEYING, **rest))).prefilled
        assert prefilled is not None
        assert prefilled.handle is None
        assert prefilled.first is not None
        assert prefilled.first.finish == "stop"


async def test_prefill_that_completes_the_grammar_lends_nothing() -> None:
    async with running() as world:
        sampling = Sampling(max_tokens=9, grammar='{"const":7}')
        attempt = await world.over(world.prefill(prompt_of(9), sampling))
        assert attempt.prefilled is not None
        assert attempt.prefilled.handle is None
        assert attempt.prefilled.first is not None
        assert (attempt.prefilled.first.text, attempt.prefilled.first.finish) == ("7", "stop")


async def test_preempted_answers_obey() -> None:
    async with running(SMALL, max_step_tokens=16) as world:
        keys = [
            world.decode(
                prompt_of(60, salt), msgspec.structs.replace(OBEYING, seed=salt, max_tokens=120)
            )
            for salt in range(5)
        ]
        answers = [await world.over(key) for key in keys]
        assert world.stepper.stats().preemptions > 0
        for answer in answers:
            check(answer.text)


async def test_min_tokens_gives_way_where_the_grammar_must_end() -> None:
    async with running() as world:
        sampling = msgspec.structs.replace(OBEYING, min_tokens=150)
        ended = await world.over(world.decode(prompt_of(9), sampling))
        check(ended.text)
        assert len(ended.ids) < 150
        number = Sampling(max_tokens=50, min_tokens=6, grammar='{"type":"number"}')
        longer = await world.over(world.decode(prompt_of(9), number))
        assert len(longer.ids) > 6
        assert longer.finish == "stop"


async def test_ignored_end_is_never_sampled() -> None:
    async with running() as world:
        sampling = Sampling(max_tokens=12, ignore_eos=True, grammar='{"type":"number"}')
        ended = await world.over(world.decode(prompt_of(9), sampling))
        assert (len(ended.ids), ended.finish) == (12, "length")
        assert not set(ended.ids) & world.runner.eos_ids


async def test_bad_schema_is_an_invalid_request_in_one_line() -> None:
    async with running() as world:
        for start, leg in ((world.decode, "decode"), (world.prefill, "prefill")):
            sampling = Sampling(max_tokens=9, grammar='{"type":"nothing"}')
            attempt = await world.over(start(prompt_of(9), sampling))
            assert attempt.failed is not None
            assert (attempt.failed.leg, attempt.failed.code) == (leg, "invalid_request")
            assert attempt.failed.message == "grammar: Invalid type: nothing"
        foreign = {"output_ids": [120], "chars_sent": 1}
        attempt = await world.over(world.decode(prompt_of(9), OBEYING, **foreign))
        assert attempt.failed is not None
        assert "output so far" in attempt.failed.message


class Gate:
    """Compiling waits for the test."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.entered = asyncio.Event()

    def wait(self, schema: str) -> None:
        self.asked.append(schema)
        self.loop.call_soon_threadsafe(self.entered.set)
        assert self.open.wait(20)


@contextmanager
def gated(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    real = GrammarCompiler.state

    def state(self: GrammarCompiler, schema: str, *args: object, **options: object) -> GrammarState:
        gate.wait(schema)
        return real(self, schema, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(GrammarCompiler, "state", state)
    try:
        yield gate
    finally:
        gate.open.set()


async def test_others_go_on_while_one_waits_for_its_grammar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as world:
        with gated(world, monkeypatch) as gate:
            slow = world.decode(prompt_of(9), OBEYING)
            await world.recorder.until(lambda: world.recorder.of(slow).accepted)
            await gate.entered.wait()
            plain = await world.over(world.decode(prompt_of(9), Sampling(max_tokens=9)))
            assert len(plain.ids) == 9
            assert not world.recorder.of(slow).over
            assert world.stepper.load().waiting == 1
            gate.open.set()
            check((await world.over(slow)).text)


async def test_one_that_waits_for_its_grammar_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as world:
        with gated(world, monkeypatch) as gate:
            key = world.decode(prompt_of(9), OBEYING)
            await gate.entered.wait()
            world.stepper.cancel(key)
            await world.idle()
            assert world.is_clean()
            again = DecodeJob(key, "choice/0", prompt_of(9), OBEYING)
            world.stepper.submit(again)
            gate.open.set()
            check((await world.over(key)).text)


async def test_grammar_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as world:
        with gated(world, monkeypatch) as gate:
            key = world.decode(prompt_of(9), OBEYING)
            await gate.entered.wait()
            world.clock.ahead_s += grammar_desk.COMPILE_TIMEOUT_S + 1
            attempt = await world.over(key)
            assert attempt.failed is not None
            assert (attempt.failed.code, attempt.failed.message) == (
                "engine",
                "no grammar after 20 s",
            )


def constant(number: int) -> Sampling:
    return Sampling(max_tokens=9, grammar=json.dumps({"const": number}))


@pytest.mark.parametrize("how", ["cancelled", "given up"])
async def test_schema_that_nobody_waits_for_is_not_compiled(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as world:
        with gated(world, monkeypatch) as gate:
            keys = [world.decode(prompt_of(9), constant(number)) for number in range(3)]
            await gate.entered.wait()
            if how == "cancelled":
                world.stepper.cancel(keys.pop())
            else:
                world.clock.ahead_s += grammar_desk.COMPILE_TIMEOUT_S + 1
                assert all([(await world.over(key)).failed for key in keys])
                keys.clear()
            await world.over(world.decode(prompt_of(9), Sampling(max_tokens=1)))
            last = world.decode(prompt_of(9), constant(3))
            gate.open.set()
            texts = [(await world.over(key)).text for key in [*keys, last]]
            assert texts == [*map(str, range(len(keys))), "3"]
            assert {*gate.asked} == {constant(number).grammar for number in (0, 1, 3)}


async def test_schema_too_many_is_refused_at_once_and_may_be_tried_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_desk, "MAX_UNCOMPILED", 0)
    async with running() as world:
        for start, leg in ((world.decode, "decode"), (world.prefill, "prefill")):
            attempt = await world.over(start(prompt_of(9), OBEYING))
            assert attempt.failed is not None
            assert (attempt.failed.leg, attempt.failed.code) == (leg, "aborted")
            assert attempt.failed.message == "too many schemas wait to be compiled"
        assert len((await world.over(world.decode(prompt_of(9), Sampling(max_tokens=9)))).ids) == 9


async def test_grammar_that_breaks_on_the_way_ends_its_choice_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def advance(self: GrammarState, token: int) -> None:
        raise GrammarError("too complex")

    monkeypatch.setattr(GrammarState, "advance", advance)
    async with running() as world:
        broken = world.decode(prompt_of(9), OBEYING)
        plain = world.decode(prompt_of(9, 1), Sampling(max_tokens=9))
        attempt = await world.over(broken)
        assert attempt.failed is not None
        assert (attempt.failed.code, attempt.failed.message) == (
            "invalid_request",
            "grammar: too complex",
        )
        assert len((await world.over(plain)).ids) == 9

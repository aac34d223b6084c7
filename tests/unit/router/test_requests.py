"""Validation and tokenization, over a real catalog with the byte tokenizer."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protocol.blocks import unpack_ids
from protocol.bus import Message
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.memory_bus import MemoryBus, MemoryHub
from protocol.subjects import Subjects
from protocol.worker_info import Capacity, KvLayout, WorkerInfo
from router.catalog import Catalog
from router.requests import Front, Prepared
from text.assets import ModelAssets, byte_assets, encode

SUBJECTS = Subjects("test")
CONTEXT = 200


def worker(name: str, assets: ModelAssets, *, model: str = "m", digest: str = "d") -> WorkerInfo:
    return WorkerInfo(
        worker_id=name,
        incarnation=f"{name}1",
        role="both",
        model=model,
        model_digest=digest,
        layout=KvLayout(32, 64),
        capacity=Capacity(10, 10, CONTEXT),
        engine="simulated",
        assets_digest=assets.digest,
    )


class World:
    """A catalog, and workers that give their assets away."""

    def __init__(self, bus: MemoryBus, tasks: asyncio.TaskGroup) -> None:
        self.bus = bus
        self.catalog = Catalog(
            bus=bus, subjects=SUBJECTS, router_id="r", tasks=tasks, wall_clock=lambda: 1000.5
        )
        self.catalog.listing_came = True
        rng, now = random.Random(1), 2000.9
        self.front = Front(self.catalog, max_choices=8, rng=rng, wall_clock=lambda: now)
        self.asked: list[str] = []

    async def add(self, info: WorkerInfo, payload: bytes) -> None:
        def give(message: Message) -> None:
            self.asked.append(info.worker_id)
            self.bus.publish(message.reply, payload)

        await self.bus.subscribe(SUBJECTS.jobs(info.worker_id, info.incarnation), give)
        self.catalog.listed(info)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    bus = MemoryBus(MemoryHub())
    await bus.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            world = World(bus, tasks)
            assets = byte_assets()
            await world.add(worker("w", assets), encode(assets))
            yield world
            for info in [worker("w", assets)]:
                world.catalog.unlisted(info.worker_id, info.incarnation)
    finally:
        await bus.close()


async def text(world: World, **fields: Any) -> Prepared:
    body = json.dumps({"model": "m", "prompt": "abc", **fields}).encode()
    return await world.front.completion(body, "rid")


async def chat(world: World, **fields: Any) -> Prepared:
    messages = [{"role": "user", "content": "abc"}]
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    return await world.front.chat(body, "rid")


def ids(prepared: Prepared, index: int = 0) -> list[int]:
    prompt = prepared.specs[index].prompt
    assert isinstance(prompt, Tokens)
    return list(unpack_ids(prompt.packed))


async def test_a_plain_completion(world: World) -> None:
    prepared = await text(world, max_tokens=5, temperature=0.5, top_p=0.9, top_k=-1, stop="x")
    [spec] = prepared.specs
    assert ids(prepared) == [256, *b"abc"]
    assert (spec.choice, spec.index, spec.num_prompt_tokens) == ("rid/0", 0, 4)
    assert (spec.model, spec.model_digest, spec.cache_salt) == ("m", "d", "")
    sampling = spec.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.top_k, sampling.stop) == (0, ["x"])
    assert (prepared.stream, prepared.include_usage, prepared.n) == (False, False, 1)
    assert (prepared.answer.id, prepared.answer.created) == ("cmpl-rid", 2000)


async def test_a_chat_is_rendered_and_has_no_second_begin(world: World) -> None:
    prepared = await chat(world, stream=True, stream_options={"include_usage": True})
    prompt = ids(prepared)
    assert bytes(i for i in prompt if i < 256).count(b"abc") == 1
    assert prompt.count(256) <= 1
    assert (prepared.stream, prepared.include_usage) == (True, True)
    assert prepared.answer.id == "chatcmpl-rid"


async def test_prompts_come_in_four_forms(world: World) -> None:
    for prompt, expected in (
        ("ab", [[256, 97, 98]]),
        ([97, 98], [[97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ):
        prepared = await text(world, prompt=prompt)
        assert [ids(prepared, i) for i in range(len(prepared.specs))] == expected


async def test_choices_are_numbered_prompt_by_prompt_and_seeded_in_order(world: World) -> None:
    prepared = await text(world, prompt=["a", "b"], n=2, seed=10)
    assert [spec.index for spec in prepared.specs] == [0, 1, 2, 3]
    assert [spec.choice for spec in prepared.specs] == [f"rid/{i}" for i in range(4)]
    assert [spec.sampling.seed for spec in prepared.specs] == [10, 11, 10, 11]
    assert [ids(prepared, i)[-1] for i in range(4)] == [97, 97, 98, 98]


async def test_seeds_fit_the_wire_and_are_drawn_when_absent(world: World) -> None:
    for seed in (-1, 0, 2**63 - 1, 2**80, -(2**80)):
        [spec] = (await text(world, seed=seed)).specs
        assert 0 <= spec.sampling.seed < 2**63
    drawn = {(await text(world)).specs[0].sampling.seed for _ in range(5)}
    assert len(drawn) == 5


async def test_max_tokens_is_bounded_by_the_context(world: World) -> None:
    assert (await text(world, max_tokens=CONTEXT - 4)).specs[0].sampling.max_tokens == 196
    assert (await text(world)).specs[0].sampling.max_tokens == 196  # the model's 256, cut
    assert (await chat(world, max_tokens=9)).specs[0].sampling.max_tokens == 9
    both = await chat(world, max_tokens=9, max_completion_tokens=3)
    assert both.specs[0].sampling.max_tokens == 3


async def test_a_request_that_wants_text_alone_has_no_details(world: World) -> None:
    assert (await text(world, logprobs=None, echo=False, n=2)).wanted is None
    assert (await chat(world, logprobs=False, top_logprobs=0)).wanted is None


async def test_logprobs_are_asked_for_every_choice(world: World) -> None:
    prepared = await text(world, logprobs=0, n=2, skip_special_tokens=False)
    assert prepared.wanted is not None
    assert prepared.wanted.with_logprobs
    assert not prepared.wanted.skip_special_tokens
    assert [spec.sampling.logprobs for spec in prepared.specs] == [0, 0]
    assert [spec.sampling.prompt_logprobs for spec in prepared.specs] == [-1, -1]
    [spec] = (await chat(world, logprobs=True, top_logprobs=4)).specs
    assert (spec.sampling.logprobs, spec.sampling.prompt_logprobs) == (4, -1)


async def test_a_prompt_is_scored_once_however_many_choices_it_has(world: World) -> None:
    prepared = await text(world, prompt=["a", "b"], echo=True, logprobs=3, n=2)
    assert [spec.sampling.prompt_logprobs for spec in prepared.specs] == [3, -1, 3, -1]
    assert prepared.wanted is not None
    assert [echo.text for echo in prepared.wanted.echoes] == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), ([97, 98], ["ab"]), (["a", "b"], ["a", "b"]), ([[256, 97], [98]], ["a", "b"])],
    ids=str,
)
async def test_every_form_of_a_prompt_is_echoed(world: World, prompt: Any, texts: Any) -> None:
    prepared = await text(world, prompt=prompt, echo=True)
    assert prepared.wanted is not None
    assert [echo.text for echo in prepared.wanted.echoes] == texts
    assert not prepared.wanted.with_logprobs


async def test_scoring_asks_a_worker_for_the_one_token_it_cannot_but_make(world: World) -> None:
    prepared = await text(world, echo=True, max_tokens=0, logprobs=1)
    [spec] = prepared.specs
    assert (spec.scores_only, spec.sampling.max_tokens) == (True, 1)
    with pytest.raises(ClientError) as error:
        await text(world, echo=True, max_tokens=0, min_tokens=1)
    assert error.value.param == "min_tokens"
    with pytest.raises(ClientError) as error:
        await chat(world, max_tokens=0)
    assert error.value.param == "max_tokens"


async def test_a_long_prompt_is_echoed_off_the_loop_with_the_same_result(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await text(world, echo=True, logprobs=0)
    monkeypatch.setattr("router.requests.LONG_PROMPT_TOKENS", 2)
    there = await text(world, echo=True, logprobs=0)
    assert here.wanted is not None
    assert there.wanted is not None
    assert here.wanted.echoes == there.wanted.echoes


async def test_equal_prompts_of_a_request_are_siblings(world: World) -> None:
    def names(prepared: Prepared) -> list[str]:
        return [spec.siblings for spec in prepared.specs]

    assert names(await text(world)) == [""]
    [one, other] = names(await text(world, n=2))
    assert one == other != ""
    a, b, c, d = names(await text(world, prompt=["a", "b", "a", "c"]))
    assert (b, d, a) == ("", "", c)
    assert a
    pairs = names(await text(world, prompt=["a", "b"], n=2))
    assert pairs[0] == pairs[1] != pairs[2] == pairs[3]


async def test_a_schema_travels_with_the_name_of_its_field(world: World) -> None:
    [spec] = (await chat(world, response_format={"type": "json_object"})).specs
    assert (spec.sampling.grammar, spec.grammar_param) == ('{"type":"object"}', "response_format")
    [spec] = (await text(world, guided_json={"type": "null"}, n=1, best_of=1)).specs
    assert (spec.sampling.grammar, spec.grammar_param) == ('{"type":"null"}', "guided_json")
    [spec] = (await text(world)).specs
    assert (spec.sampling.grammar, spec.grammar_param) == ("", "")


async def test_best_of_may_say_what_is_so_anyway(world: World) -> None:
    for best_of in (None, 1, 3):
        assert (await text(world, n=3, best_of=best_of)).n == 3


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 2}, "invalid_value", "best_of"),
    ({"best_of": 0}, "invalid_value", "best_of"),
    ({"n": 2, "best_of": 3}, "invalid_value", "best_of"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"logit_bias": {"259000": 1}}, "invalid_value", "logit_bias"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"max_tokens": 0, "logprobs": 1}, "invalid_value", "max_tokens"),
    ({"max_tokens": -1, "echo": True}, "invalid_value", "max_tokens"),
    ({"prompt": "a" * CONTEXT, "echo": True}, "context_length_exceeded", "prompt"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"model": None}, "missing_parameter", "model"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt"),
    ({"prompt": ["a", 1]}, "invalid_type", "prompt"),
    ({"prompt": [[1], "a"]}, "invalid_type", "prompt"),
    ({"prompt": [10**9]}, "invalid_value", "prompt"),
    ({"prompt": [-1]}, "invalid_value", "prompt"),
    ({"prompt": "a" * CONTEXT}, "context_length_exceeded", "prompt"),
    ({"prompt": ["a"] * 9}, "too_many_choices", "n"),
    ({"prompt": ["a"] * 3, "n": 3}, "too_many_choices", "n"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 129}, "invalid_value", "n"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": CONTEXT - 3}, "context_length_exceeded", "max_tokens"),
    ({"temperature": 2.01}, "invalid_value", "temperature"),
    ({"top_p": 0.0}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"min_tokens": 6, "max_tokens": 5}, "invalid_value", "min_tokens"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"stop_token_ids": [2**64]}, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "invalid_value", "stop_token_ids"),
    ({"cache_salt": "x" * 257}, "invalid_value", "cache_salt"),
    ({"stream_options": {}}, "invalid_value", "stream_options"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD, ids=lambda value: str(value)[:30])
async def test_what_is_wrong_is_named(
    world: World, fields: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(ClientError) as error:
        await text(world, **fields)
    assert (error.value.status, error.value.code, error.value.param) == (400, code, param)


async def test_the_numbers_of_echoed_prompts_are_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.requests.MAX_ENTRIES", 4 * 2 * 21)  # tokens, choices, numbers
    assert (await text(world, echo=True, logprobs=20, n=2)).specs
    for fields in ({"n": 3}, {"prompt": "abcd", "n": 2}, {"prompt": ["abc"] * 3}):
        with pytest.raises(ClientError) as error:
            await text(world, echo=True, logprobs=20, **fields)
        assert (error.value.status, error.value.param) == (400, "logprobs")
    monkeypatch.setattr("router.requests.MAX_STREAMED_ENTRIES", 4 * 21)
    assert (await text(world, echo=True, logprobs=20, stream=True)).specs
    with pytest.raises(ClientError, match="at most 84"):
        await text(world, echo=True, logprobs=20, n=2, stream=True)
    assert (await text(world, echo=True, n=3)).specs  # without numbers there is no such bound
    assert (await text(world, logprobs=20, n=3)).specs


async def test_a_long_prompt_is_tokenized_off_the_loop_with_the_same_result(world: World) -> None:
    long = "a" * 20_000
    with pytest.raises(ClientError) as error:
        await text(world, prompt=long)
    assert f"{len(long) + 1} tokens" in error.value.message
    with pytest.raises(ClientError) as error:
        await chat(world, messages=[{"role": "user", "content": long}])
    assert error.value.code == "context_length_exceeded"


async def test_bad_messages_and_a_failing_template_are_the_clients(world: World) -> None:
    with pytest.raises(ClientError) as error:
        await chat(world, messages=[])
    assert (error.value.status, error.value.param) == (400, "messages")
    with pytest.raises(ClientError) as error:
        await chat(world, messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    assert error.value.code == "invalid_messages"


async def test_an_unknown_model_is_a_404(world: World) -> None:
    with pytest.raises(ClientError) as error:
        await text(world, model="other")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


async def test_assets_are_fetched_once_per_digest(world: World) -> None:
    assets = byte_assets()
    await world.add(worker("v", assets), encode(assets))
    await text(world)
    await text(world)
    assert world.asked == ["w"]
    world.catalog.unlisted("v", "v1")


async def test_a_worker_with_rubbish_for_assets_makes_its_model_unavailable_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.catalog.ASSETS_WAIT_S", 0.2)
    other = byte_assets("other")
    await world.add(worker("bad", other, model="bad"), b"\xc1rubbish")
    with pytest.raises(ClientError) as error:
        await text(world, model="bad")
    assert (error.value.status, error.value.code) == (503, "assets_unavailable")
    assert (await text(world)).specs
    await world.add(worker("good", other, model="bad"), encode(other))
    monkeypatch.setattr("router.catalog.ASSETS_WAIT_S", 5.0)
    assert (await text(world, model="bad")).specs
    for name in ("bad", "good"):
        world.catalog.unlisted(name, f"{name}1")


async def test_prompts_go_to_the_larger_side_of_a_rolling_upgrade(world: World) -> None:
    assets = byte_assets()
    for name, digest in (("x", "new"), ("y", "new")):
        await world.add(worker(name, assets, digest=digest), encode(assets))
    assert (await text(world)).specs[0].model_digest == "new"
    world.catalog.unlisted("x", "other-incarnation")  # late: changes nothing
    assert (await text(world)).specs[0].model_digest == "new"
    world.catalog.unlisted("x", "x1")
    world.catalog.unlisted("y", "y1")
    assert (await text(world)).specs[0].model_digest == "d"
    assert world.catalog.names() == [("m", 1000)]


async def test_a_model_whose_workers_left_is_not_listed_but_still_known(world: World) -> None:
    await text(world)
    world.catalog.unlisted("w", "w1")
    assert world.catalog.names() == []
    assert (await text(world)).specs[0].model_digest == "d"  # the scheduler says 503


async def test_before_the_first_listing_a_model_is_not_missing_but_unknown_yet() -> None:
    async with asyncio.TaskGroup() as tasks:
        world = World(MemoryBus(MemoryHub()), tasks)
        world.catalog.listing_came = False
        with pytest.raises(ClientError) as caught:
            await world.catalog.served("demo")
        assert (caught.value.status, caught.value.code) == (503, "discovery_pending")
        assert caught.value.retry_after_s == 1

"""A stream that loses its worker at any token says what the undisturbed one says.

Every case is asked for once in peace, alone, and then once for every token of its answer, all at
the same time, each of these cut at another token. Tokens, text, finish, usage and log-probabilities
must be the same. What is excused on torch, `tests/integration/resume_judge.py` says; on the
simulated model nothing is.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import tokenizers
from tokenizers import decoders, models, normalizers

from baton.demo import demo_model_folder
from tests.integration.resume_judge import Judge, Tally
from tests.integration.resume_world import Cut, ResumeWorld, Stream, fleet
from tests.unit.worker.tiny_llama import make_model
from text.assets import load_assets
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_TOKENS = 24
PROMPT = "The router reads a request and "
EOS = "2"
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 14}
"""This seed, like the others, makes no decision that hangs on less than the judge's margin."""
ODD = "é你😀 ż" + "漢字" * 4 + "!"
"""More than one byte for each character; the last run is longer than what is held of it."""


def body(**options: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}


def chat(**options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something about leases."}]
    return {"messages": messages, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}


def schema(kind: dict[str, Any], name: str = "json_schema") -> dict[str, Any]:
    return {"type": name, "json_schema": {"name": "x", "schema": kind}}


def every_token(calm: Stream) -> list[list[Cut]]:
    """One cut for each stream: before the first token, and behind each but the last of each choice.
    Again with the KV thrown away: behind the first token, where it could be pulled anew, and before
    the last, where the same worker finds it in its own cache."""
    found = [
        [Cut(position, index)]
        for index, said in enumerate(calm.said)
        for position in range(1, len(said.ids))
    ]
    last = len(calm.said[0].ids) - 1
    return [[Cut(0)], *found, [Cut(1, code="lease_lost")], [Cut(last, code="lease_lost")]]


async def interrupt(
    world: ResumeWorld,
    tally: Tally,
    name: str,
    asked: dict[str, Any],
    plans: Callable[[Stream], list[list[Cut]]] = every_token,
) -> Stream:
    """The undisturbed answer, after which each plan was compared with it."""
    calm = await world.answer(asked)
    tally.undisturbed(name, calm)
    before = world.num_second_chances
    cut = [(plan, await world.ask(asked, plan)) for plan in plans(calm)]
    for plan, stream in cut:
        tally.compare(name, calm, plan, await stream.end())
    assert world.num_second_chances - before >= len(cut)
    return calm


# -- fleets


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Of the trained model; what is excused is counted over all of its tests."""
    tally = Tally(Judge(demo_model_folder()))
    yield tally
    tally.check()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def demo() -> AsyncIterator[ResumeWorld]:
    async with fleet(demo_model_folder()) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def alone() -> AsyncIterator[ResumeWorld]:
    """Without prefill workers: whoever decodes has prefilled."""
    async with fleet(demo_model_folder(), prefill=0, decode=0, both=3) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def simulated() -> AsyncIterator[ResumeWorld]:
    async with fleet(None) as world:
        yield world


@pytest.fixture(scope="module")
def single_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokens()
    folder = tmp_path_factory.mktemp("resume") / "single_bytes"
    make_model(folder, vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def byte_tokens() -> tokenizers.Tokenizer:
    """As Llama 2's, but not trained, which gives other ids every time: letters, and bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,", "\u2581a", "th", "the", "in", "er"]
    merges = [("\u2581", "a"), ("t", "h"), ("th", "e"), ("i", "n"), ("e", "r")]
    vocab = {name: place for place, name in enumerate(names)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.add_special_tokens(names[:3])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return made


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_assets(load_assets(folder))


# -- which token


DRAWN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": SEEDED,
    "top_p": {"temperature": 1.3, "top_p": 0.9, "seed": 4},
    "top_k": {"temperature": 1.5, "top_k": 40, "seed": 7},
    "min_p": {"temperature": 1.3, "min_p": 0.02, "seed": 4},
    "penalties, greedy": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.9,
    },
    "penalties, drawn": {
        **SEEDED,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.7,
    },
    "logit_bias": {**SEEDED, "seed": 1, "logit_bias": {"204": 3, "295": -100, "19": 2.5}},
}


@pytest.mark.parametrize("name", DRAWN)
async def test_the_tokens_are_the_same(demo: ResumeWorld, tally: Tally, name: str) -> None:
    calm = await interrupt(demo, tally, name, body(**DRAWN[name], logprobs=3))
    assert len(calm.said[0].ids) == NUM_TOKENS
    assert len(calm.said[0].logprobs) == NUM_TOKENS


@pytest.mark.parametrize("name", ["greedy", "top_p", "penalties, drawn"])
async def test_so_they_are_where_decode_workers_prefill(
    alone: ResumeWorld, tally: Tally, name: str
) -> None:
    await interrupt(alone, tally, f"{name}, alone", body(**DRAWN[name], logprobs=0))


async def test_two_and_three_cuts_in_one_stream(demo: ResumeWorld, tally: Tally) -> None:
    def twice(_: Stream) -> list[list[Cut]]:
        plans = [[Cut(at), Cut(at + gap)] for at in range(0, 18, 2) for gap in (1, 2, 5)]
        plans += [[Cut(1), Cut(2, code="lease_lost")], [Cut(2), Cut(9), Cut(10)]]
        return plans

    asked = body(**DRAWN["penalties, drawn"], logprobs=2, stop=["never to be seen"])
    await interrupt(demo, tally, "two cuts", asked, twice)


# -- the text


async def test_stop_strings_are_found_across_the_cut(demo: ResumeWorld, tally: Tally) -> None:
    """Beginnings of others are held back, and let go or cut off, wherever the worker is lost."""
    text = (await demo.answer(body())).said[0].text
    long, late = text[3:40] + "§", text[30:58]
    asked = body(stop=[long, late])
    calm = await interrupt(demo, tally, "stop strings", asked)
    assert calm.said[0].text == text[: text.index(late)]
    assert calm.said[0].finish == "stop"
    shown = await interrupt(
        demo, tally, "stop strings in the text", {**asked, "include_stop_str_in_output": True}
    )
    assert shown.said[0].text == text[: text.index(late)] + late


async def test_what_is_held_at_the_end_comes_once(demo: ResumeWorld, tally: Tally) -> None:
    text = (await demo.answer(body(**SEEDED))).said[0].text
    asked = body(**SEEDED, stop=[text[-30:] + "§"], logprobs=0)
    calm = await interrupt(demo, tally, "held at the end", asked)
    assert calm.said[0].text == text
    assert calm.said[0].finish == "length"


async def test_halves_of_characters_are_neither_lost_nor_doubled(
    demo: ResumeWorld, tally: Tally
) -> None:
    """Whole ones, and bytes in an order that makes none."""
    asked = body(response_format=schema({"const": ODD}), max_tokens=60, logprobs=1)
    calm = await interrupt(demo, tally, "odd characters", asked)
    assert json.loads(calm.said[0].text) == ODD
    assert calm.said[0].finish == "stop"
    tokens = tokenizer_of(demo_model_folder()).encode("é你😀", add_special_tokens=False)
    broken = body(temperature=1.0, seed=4, logit_bias={str(token): 60 for token in tokens})
    calm = await interrupt(demo, tally, "broken characters", broken)
    assert {"\ufffd", "é"} <= set(calm.said[0].text)


async def test_halves_of_characters_in_tokens_of_single_bytes(single_bytes: Path) -> None:
    tally = Tally(Judge(single_bytes))
    part = tokenizer_of(single_bytes).token_bytes
    bytes_of_e = [token for token in range(259) if part(token) in (b"\xc3", b"\xa9")]
    async with fleet(single_bytes) as world:
        asked = body(response_format=schema({"const": ODD}), max_tokens=60, logprobs=1)
        calm = await interrupt(world, tally, "bytes", asked)
        assert json.loads(calm.said[0].text) == ODD
        biased = dict.fromkeys(bytes_of_e, 8) | dict.fromkeys(range(259, 290), 2)
        asked = body(temperature=0, frequency_penalty=2.0, logit_bias=biased, max_tokens=32)
        calm = await interrupt(world, tally, "broken bytes", asked)
        assert {"\ufffd", "ź", "k"} <= set(calm.said[0].text)
    tally.check()


# -- the end


async def test_min_tokens_are_counted_from_the_first(demo: ResumeWorld, tally: Tally) -> None:
    """The end is likelier than all the rest, and a stop string is there before it counts."""
    asked = body(ignore_eos=False, min_tokens=12, logit_bias={EOS: 60}, logprobs=0)
    calm = await interrupt(demo, tally, "min_tokens", asked)
    assert len(calm.said[0].ids) == 13
    assert calm.said[0].finish == "stop"
    text = (await demo.answer(body())).said[0].text
    stops = [text[6:9], text[18:21], text[-12:-6]]
    calm = await interrupt(demo, tally, "min_tokens, stop", body(min_tokens=12, stop=stops))
    assert calm.said[0].text == text[:-12]


async def test_ends_that_do_not_count_are_text(demo: ResumeWorld, tally: Tally) -> None:
    asked = body(temperature=1.0, seed=18, logit_bias={EOS: 12}, skip_special_tokens=False)
    calm = await interrupt(demo, tally, "ignore_eos", asked)
    assert int(EOS) in calm.said[0].ids[:-1]
    assert calm.said[0].finish == "length"
    calm = await interrupt(demo, tally, "stop_token_ids", body(stop_token_ids=[204], logprobs=0))
    assert calm.said[0].finish == "stop"
    assert len(calm.said[0].ids) < NUM_TOKENS


# -- more than text


async def test_each_of_several_choices_goes_on_by_itself(demo: ResumeWorld, tally: Tally) -> None:
    calm = await interrupt(
        demo, tally, "n", body(temperature=1.0, seed=1, n=3, max_tokens=12, logprobs=1)
    )
    assert len({said.text for said in calm.said}) == 3


async def test_all_choices_at_once(demo: ResumeWorld, tally: Tally) -> None:
    def together(_: Stream) -> list[list[Cut]]:
        return [[Cut(at, index) for index in range(3)] for at in range(1, 7)]

    asked = chat(temperature=1.0, seed=52, n=3, max_tokens=8)
    await interrupt(demo, tally, "n at once", asked, together)


async def test_chats_with_log_probabilities(demo: ResumeWorld, tally: Tally) -> None:
    asked = chat(temperature=0.9, seed=15, logprobs=True, top_logprobs=4)
    calm = await interrupt(demo, tally, "chat", asked)
    assert len(calm.said[0].logprobs) == NUM_TOKENS


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_prompts_that_are_echoed(
    demo: ResumeWorld, tally: Tally, logprobs: int | None
) -> None:
    calm = await interrupt(
        demo,
        tally,
        "echo",
        body(echo=True, logprobs=logprobs, n=2, max_tokens=10, temperature=1.0, seed=1),
    )
    assert all(said.text.startswith(PROMPT) for said in calm.said)
    lengths = {len(said.logprobs) for said in calm.said}
    assert lengths == ({0} if logprobs is None else {calm.usage["prompt_tokens"] + 10})


async def test_prompts_that_are_only_scored(demo: ResumeWorld, tally: Tally) -> None:
    asked = body(echo=True, logprobs=2, max_tokens=0)
    calm = await interrupt(demo, tally, "scores", asked, lambda _: [[Cut(0)], [Cut(0)]])
    assert calm.said[0].text == PROMPT
    assert calm.usage["completion_tokens"] == 0


async def test_answers_in_a_piece(demo: ResumeWorld, tally: Tally) -> None:
    asked = chat(temperature=0.9, seed=15, logprobs=True, top_logprobs=2, stream=False)
    calm = await interrupt(demo, tally, "in a piece", asked)
    assert calm.usage["completion_tokens"] == NUM_TOKENS
    await interrupt(demo, tally, "text in a piece", body(stream=False, n=2, max_tokens=8))


SHAPE = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 2},
        "count": {"type": "integer"},
    },
    "required": ["names", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "drawn"])
async def test_schemas_are_obeyed_across_the_cut(
    demo: ResumeWorld, tally: Tally, options: dict[str, Any]
) -> None:
    asked = body(response_format=schema(SHAPE), max_tokens=32, logprobs=0, **options)
    await interrupt(demo, tally, f"schema {options}", asked)


async def test_usage_is_that_of_the_first_attempt(alone: ResumeWorld, tally: Tally) -> None:
    """What it found in the cache counts; what a resume finds, or computes again, does not."""
    asked = body(prompt=PROMPT * 12, cache_salt="shared", **SEEDED)
    cold = await alone.answer(asked)
    warm = await alone.answer(asked)
    cached = warm.usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > cold.usage["prompt_tokens_details"]["cached_tokens"] == 0
    for position in (1, 7, 15, 23):
        plan = [Cut(position)]
        stream = await (await alone.ask(asked, plan)).end()
        tally.compare("usage", warm, plan, stream)
    assert warm.usage["completion_tokens"] == NUM_TOKENS


# -- the simulated model

SIMULATED: dict[str, dict[str, Any]] = {
    "greedy": body(temperature=0.0, logprobs=2),
    "drawn": body(**SEEDED, logprobs=2),
    "choices": body(**SEEDED, n=3, max_tokens=12, logprobs=1, echo=True),
    "chat": chat(**SEEDED, n=2, max_tokens=12, logprobs=True, top_logprobs=3),
    "schema": body(**SEEDED, response_format=schema(SHAPE), max_tokens=40, min_tokens=5),
    "odd characters": body(response_format=schema({"const": ODD}), max_tokens=60, logprobs=1),
}


@pytest.mark.parametrize("name", SIMULATED)
async def test_simulated_streams_are_always_exact(simulated: ResumeWorld, name: str) -> None:
    tally = Tally(None)
    await interrupt(simulated, tally, name, SIMULATED[name])
    tally.check()


async def test_simulated_stop_strings(simulated: ResumeWorld) -> None:
    tally = Tally(None)
    text = (await simulated.answer(body(**SEEDED))).said[0].text
    stops = [text[2:4], text[5:14] + "§", text[12:19]]
    calm = await interrupt(simulated, tally, "stop", body(**SEEDED, stop=stops, min_tokens=8))
    assert calm.said[0].text == text[:12]
    tally.check()


async def test_a_tally_excuses_nothing_that_is_clear(
    demo: ResumeWorld, simulated: ResumeWorld
) -> None:
    """Another seed, other text: the comparison itself."""
    for world, judge in ((demo, Judge(demo_model_folder())), (simulated, None)):
        tally = Tally(judge)
        calm = await world.answer(body(**SEEDED))
        other = await world.answer(body(temperature=1.0, seed=6))
        tally.compare("other", calm, [], other)
        assert tally.problems or tally.excused > 0.01
        same: Sequence[str] = [problem for problem in tally.problems if "usage" in problem]
        assert not same

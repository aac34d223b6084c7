"""Prompts and log-probabilities in answers: each token once, in order, streamed or not."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.out import Delta, Finish, TokenLogprob
from protocol.sampling import Sampling
from router.answers import Answer, Kind
from router.choices import Choice, ChoiceSpec
from router.details import Wanted
from router.echo import Echo, echo_of
from router.logprobs import TokenNames
from router.requests import Prepared
from router.sinks import DetailedCollectSink, DetailedStreamSink, collect_sink, stream_sink
from tests.unit.router.said import Said
from text.assets import byte_assets
from text.tokenizer import Tokenizer

BYTES = Tokenizer.from_assets(byte_assets())
NAMES = TokenNames(BYTES)


def likely(ids: Sequence[int]) -> list[TokenLogprob]:
    return [TokenLogprob(-float(i + 1), [(i, -float(i + 1))]) for i in ids]


def of_prompt(ids: Sequence[int]) -> list[TokenLogprob | None]:
    return [None, *likely(ids[1:])]


class Asked:
    """One request, asked twice: as a stream and in a piece."""

    def __init__(
        self,
        *prompts: str,
        kind: Kind = "text",
        n: int = 1,
        logprobs: bool = True,
        echo: bool = False,
        scores_only: bool = False,
    ) -> None:
        ids = [BYTES.encode(prompt, add_special_tokens=True) for prompt in prompts]
        self.prompts = [one for one in ids for _ in range(n)]
        asks = 1 if logprobs else -1
        specs = [
            ChoiceSpec(
                f"r/{i}",
                i,
                "m",
                Tokens(pack_ids(one)),
                len(one),
                Sampling(9, logprobs=asks, prompt_logprobs=-1 if i % n or not echo else asks),
                scores_only=scores_only,
            )
            for i, one in enumerate(self.prompts)
        ]
        echoes: list[Echo] = []
        if echo:
            echoes = [
                echo_of(prompt, one, BYTES, skip_special_tokens=True, with_offsets=logprobs)
                for prompt, one in zip(prompts, ids, strict=True)
            ]
        wanted = Wanted(BYTES, NAMES, logprobs, True, echoes)
        answer = Answer(kind, "r", "m", 1)
        prepared = Prepared(answer, specs, n, True, False, wanted)
        self.said = Said()
        self.cancelled: list[str] = []
        self.stream = stream_sink(prepared, self.cancelled.append, self.said)
        self.whole = collect_sink(prepared, self.cancelled.append)
        assert type(self.stream) is DetailedStreamSink
        assert type(self.whole) is DetailedCollectSink
        self.choices = [Choice(spec, self.stream, 0.0) for spec in specs]

    def prefilled(self, index: int) -> None:
        self.choices[index].prompt_logprobs = of_prompt(self.prompts[index])

    def token(
        self,
        index: int,
        ids: Sequence[int],
        text: str,
        finish: Finish = "",
        entries: Sequence[TokenLogprob] | None = None,
    ) -> None:
        choice = self.choices[index]
        found = likely(ids) if entries is None else [*entries]
        delta = Delta(1, len(choice.output), [*ids], text, finish, None, found)
        choice.output.extend(ids)
        self.stream.delta(choice, delta)
        self.whole.delta(choice, delta)

    def end(self, *indexes: int) -> None:
        for index in indexes:
            self.stream.ended(self.choices[index], None)
            self.whole.ended(self.choices[index], None)

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.whole.body())
        return body

    def streamed(self, index: int) -> dict[str, list[Any]]:
        """Text, finish and the joined `logprobs` of one choice's chunks."""
        found: dict[str, list[Any]] = {"text": [], "finish": []}
        for chunk in self.said.chunks:
            [choice] = chunk["choices"]
            if choice["index"] == index:
                found["text"].append(choice.get("text", choice.get("delta", {}).get("content")))
                found["finish"].append(choice["finish_reason"])
                for name, values in (choice.get("logprobs") or {}).items():
                    found.setdefault(name, []).extend(values or [])
        return found


async def test_a_streamed_chat_and_a_whole_one_have_the_same_tokens() -> None:
    asked = Asked("p", kind="chat")
    asked.token(0, [97], "a")
    asked.token(0, [*"漢".encode()][:2], "")
    asked.token(0, [*"漢".encode()][2:], "漢")
    asked.token(0, [257], "", "stop")
    asked.end(0)
    [choice] = ChatCompletion.model_validate(asked.body()).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    names = ["a", "\\xe6", "\\xbc", "\\xa2", "<|eos|>"]
    assert [token.token for token in choice.logprobs.content] == names
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in asked.said.chunks]
    counts = [len((c.choices[0].logprobs or choice.logprobs).content or []) for c in chunks]
    assert counts == [1, 3, 1]  # what has no text waits for the next that has
    told = asked.streamed(0)
    assert told["content"] == asked.body()["choices"][0]["logprobs"]["content"]
    assert (told["text"], told["finish"]) == (["a", "漢", None], [None, None, "stop"])
    assert asked.body()["usage"]["completion_tokens"] == len(names)


async def test_text_that_is_held_back_keeps_its_tokens_for_one_chunk() -> None:
    asked = Asked("p")
    for byte in b"sto":
        asked.token(0, [byte], "")
    assert asked.said.chunks == []
    asked.token(0, [*b"ry"], "story")
    asked.token(0, [33], "", "length")
    asked.end(0)
    assert [len(c["choices"][0]["logprobs"]["tokens"]) for c in asked.said.chunks] == [5, 1]
    assert asked.streamed(0)["text_offset"] == [0, 1, 2, 3, 4, 5]


async def test_a_chunk_without_tokens_says_null() -> None:
    """A stop that a resumed choice had reached already ends it without a token."""
    asked = Asked("p", kind="chat")
    asked.token(0, [97], "a")
    asked.token(0, [], "", "stop", entries=[])
    asked.end(0)
    assert asked.said.chunks[1]["choices"][0]["logprobs"] is None
    assert len(asked.body()["choices"][0]["logprobs"]["content"]) == 1


async def test_an_echoed_prompt_stands_before_the_output() -> None:
    asked = Asked("ab", logprobs=False, echo=True)
    assert asked.said.chunks == []  # an error may still have its status
    asked.token(0, [99], "c", "length")
    asked.end(0)
    assert asked.streamed(0) == {"text": ["ab", "c"], "finish": [None, "length"]}
    assert "logprobs" not in asked.said.chunks[0]["choices"][0]
    [choice] = asked.body()["choices"]
    assert (choice["text"], "logprobs" in choice) == ("abc", False)
    usage = asked.body()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 1)


async def test_an_echoed_prompts_tokens_stand_before_the_outputs() -> None:
    asked = Asked("ab", echo=True)
    asked.prefilled(0)
    asked.token(0, [99], "c")
    asked.token(0, [100], "d", "length")
    asked.end(0)
    chunks = [chunk["choices"][0] for chunk in asked.said.chunks]
    assert [chunk["text"] for chunk in chunks] == ["ab", "c", "d"]
    assert [len(chunk["logprobs"]["tokens"]) for chunk in chunks] == [3, 1, 1]
    told = asked.streamed(0)
    assert told["tokens"] == ["<|bos|>", "a", "b", "c", "d"]
    assert told["token_logprobs"] == [None, -98.0, -99.0, -100.0, -101.0]
    assert told["text_offset"] == [0, 0, 1, 2, 3]
    assert told["top_logprobs"][0] is None
    [choice] = asked.body()["choices"]
    assert choice["text"] == "abcd"
    assert choice["logprobs"] == {
        name: told[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }


async def test_scoring_shows_nothing_of_the_token_that_had_to_be_made() -> None:
    asked = Asked("ab", echo=True, scores_only=True)
    asked.prefilled(0)
    asked.token(0, [257], "x", "stop")
    asked.end(0)
    told = asked.streamed(0)
    assert (told["text"], told["finish"]) == (["ab", ""], [None, "length"])
    assert told["tokens"] == ["<|bos|>", "a", "b"]
    body = asked.body()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == told["tokens"]
    assert (body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (0, 3)


async def test_siblings_wait_for_the_prompt_of_the_first() -> None:
    asked = Asked("ab", "z", n=3, echo=True)
    asked.token(2, [99], "c")
    asked.token(2, [100], "d", "length")
    asked.token(4, [101], "e", "length")
    assert asked.said.chunks == []
    asked.prefilled(0)
    asked.token(0, [102], "f", "length")
    texts = {i: "".join(asked.streamed(i)["text"]) for i in range(6)}
    assert texts == {0: "abf", 1: "", 2: "abcd", 3: "", 4: "", 5: ""}
    asked.token(1, [103], "g", "length")
    asked.prefilled(3)
    for index in (3, 5):
        asked.token(index, [104], "h", "length")
    asked.end(*range(6))
    for index, choice in enumerate(asked.body()["choices"]):
        told = asked.streamed(index)
        assert "".join(told["text"]) == choice["text"]
        assert told["tokens"] == choice["logprobs"]["tokens"]
        assert "".join(told["tokens"]) == f"<|bos|>{choice['text']}"
        assert told["finish"][-1] == choice["finish_reason"] == "length"


@pytest.mark.parametrize("seed", range(20))
async def test_however_it_is_cut_each_token_comes_once(seed: int) -> None:
    rng = random.Random(seed)
    asked = Asked("prompt", "p", n=2, echo=True)
    outputs = [[rng.randrange(97, 123) for _ in range(rng.randrange(1, 12))] for _ in range(4)]
    waiting = dict.fromkeys(range(4), 0)
    held = dict.fromkeys(range(4), "")
    while waiting:
        index = rng.choice(sorted(waiting))
        asked.prefilled(index - index % 2)
        begin = waiting[index]
        end = min(len(outputs[index]), begin + rng.randrange(1, 4))
        ids = outputs[index][begin:end]
        held[index] += bytes(ids).decode()
        is_last = end == len(outputs[index])
        text = held[index] if is_last else held[index][: rng.randrange(len(held[index]) + 1)]
        held[index] = held[index][len(text) :]
        asked.token(index, ids, text, "length" if is_last else "")
        waiting[index] = end
        if is_last:
            del waiting[index]
            asked.end(index)
    for index, choice in enumerate(asked.body()["choices"]):
        ids = asked.prompts[index] + outputs[index]
        told = asked.streamed(index)
        assert told["tokens"] == choice["logprobs"]["tokens"] == [BYTES.token(i) for i in ids]
        assert told["token_logprobs"] == [None, *(-float(i + 1) for i in ids[1:])]
        assert told["text_offset"] == [0, *range(len(ids) - 1)]
        assert "".join(told["text"]) == choice["text"] == bytes(ids[1:]).decode()


@pytest.mark.parametrize("missing", ["output", "short", "prompt", "short_prompt"])
async def test_an_engine_that_gives_none_ends_the_request(missing: str) -> None:
    """A worker of another version, say: never an answer with holes."""
    asked = Asked("ab", n=2, echo=True)
    asked.prefilled(0)
    if missing == "prompt":
        asked.choices[0].prompt_logprobs = None
    if missing == "short_prompt":
        asked.choices[0].prompt_logprobs = [None]
    choice = asked.choices[0]
    entries = {"output": None, "short": likely([1, 2])}.get(missing, likely([99]))
    delta = Delta(1, 0, [99], "c", "", None, entries)
    asked.stream.delta(choice, delta)
    asked.whole.delta(choice, delta)
    [error] = asked.said.ends
    assert error is not None
    assert (error.status, error.code, error.param) == (501, "logprobs_unavailable", "logprobs")
    assert asked.whole.done.is_set()
    with pytest.raises(ClientError, match="log-probabilities"):
        await asked.whole.rendered()
    assert sorted(asked.cancelled) == ["r/0", "r/0", "r/1", "r/1"]
    asked.token(1, [99], "late")
    assert asked.said.chunks == []


async def test_a_long_answer_is_rendered_the_same_in_a_thread() -> None:
    asked = Asked("ab")
    asked.token(0, [97] * 3000, "a" * 3000, "length")
    asked.end(0)
    rendered = json.loads(await asked.whole.rendered())
    assert rendered == asked.body()
    assert len(rendered["choices"][0]["logprobs"]["tokens"]) == 3000

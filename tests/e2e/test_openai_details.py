"""Log-probabilities, echo, schemas, penalties and `n` as the unmodified `openai` client sees them,
on both engines: one prefill worker, the rest on decode workers."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pydantic
import pytest

from tests.e2e.fleet import MODEL, Fleet

pytestmark = pytest.mark.xdist_group("api")

PROMPT = "the quick brown fox jumps over the lazy dog and "
LONG = PROMPT * 12
"""Long enough to be prefilled on the prefill worker."""
MAX_BLOCK = 64
"""No engine here has longer blocks."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["simulated", "torch"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with Fleet(
        tmp_path_factory.mktemp("details"),
        engine=request.param,
        prefill=2 if request.param == "simulated" else 1,
        settings=["prefill.metrics_port=-1"],
    ) as fleet:
        yield fleet


@pytest.fixture
def client(served: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.base_url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client
    served.until_idle()


@dataclass
class Joined:
    """One choice of a streamed completion."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    finish: str | None = None


def joined(client: openai.OpenAI, **asked: Any) -> tuple[dict[int, Joined], Any]:
    """Choices by index, and usage."""
    found: dict[int, Joined] = {}
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            one = found.setdefault(choice.index, Joined())
            assert one.finish is None
            one.text += choice.text
            one.finish = choice.finish_reason
            if choice.logprobs is not None:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    getattr(one, name).extend(getattr(choice.logprobs, name) or [])
    return found, usage


def user(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def close(a: list[float | None], b: list[float | None]) -> bool:
    """Batch shapes move float sums a little."""
    assert len(a) == len(b)
    return all(
        x is y is None or math.isclose(x or 0, y or 0, abs_tol=2e-3)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("prompt", ["short", LONG], ids=["local", "handed_over"])
def test_a_chats_logprobs(client: openai.OpenAI, prompt: str) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": user(prompt),
        "max_tokens": 12,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 3,
    }
    answer = client.chat.completions.create(**asked)
    assert answer.usage is not None
    [choice] = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == answer.usage.completion_tokens
    text = b"".join(bytes(token.bytes or []) for token in content).decode(errors="replace")
    assert choice.message.content is not None
    assert text.startswith(choice.message.content.rstrip("\ufffd"))
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.001
        assert token.logprob <= values[0] + 1e-6
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [token.token for token in streamed] == [token.token for token in content]
    assert close([t.logprob for t in streamed], [t.logprob for t in content])


def test_logprobs_without_others(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(
        model=MODEL, messages=user("a"), max_tokens=3, logprobs=True
    ).choices
    assert choice.logprobs is not None
    assert [t.top_logprobs for t in choice.logprobs.content or []] == [[]] * 3
    [plain] = client.chat.completions.create(model=MODEL, messages=user("a"), max_tokens=3).choices
    assert plain.logprobs is None


def test_a_stop_string_holds_text_back_but_no_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 2, "logprobs": 1}
    free = client.completions.create(**asked, max_tokens=40).choices[0].text
    stop = free[6:9]
    answer = client.completions.create(**asked, max_tokens=40, stop=[stop, "never to be seen"])
    [choice] = answer.choices
    assert (choice.finish_reason, choice.text) == ("stop", free[: free.index(stop)])
    assert choice.logprobs is not None
    assert answer.usage is not None
    assert len(choice.logprobs.tokens or []) == answer.usage.completion_tokens
    found, usage = joined(client, **asked, max_tokens=40, stop=[stop, "never to be seen"])
    assert found[0].tokens == choice.logprobs.tokens
    assert found[0].text == choice.text
    assert usage == answer.usage


@pytest.mark.parametrize("prompt", ["fox", LONG], ids=["local", "handed_over"])
def test_echo_gives_the_prompt_and_its_logprobs(client: openai.OpenAI, prompt: str) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "seed": 1}
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == prompt + plain.choices[0].text
    assert echoed.usage is not None
    assert plain.usage is not None
    assert echoed.usage.completion_tokens == plain.usage.completion_tokens
    answer = client.completions.create(**asked, echo=True, logprobs=2)
    [choice] = answer.choices
    assert choice.text == echoed.choices[0].text
    logprobs = choice.logprobs
    assert logprobs is not None
    assert answer.usage is not None
    total = answer.usage.total_tokens
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert [len(one or []) for one in lists] == [total] * 4
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    offsets = logprobs.text_offset or []
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[answer.usage.prompt_tokens] == len(prompt)
    found, usage = joined(client, **asked, echo=True, logprobs=2)
    assert found[0].text == choice.text
    assert (found[0].tokens, found[0].text_offset) == (logprobs.tokens, offsets)
    assert close(found[0].token_logprobs, [*logprobs.token_logprobs])
    assert usage.total_tokens == total
    output = client.completions.create(**asked, logprobs=2).choices[0].logprobs
    assert output is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[-len(output.tokens or []) :] == output.tokens


def test_scoring_makes_no_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": LONG, "echo": True, "logprobs": 1}
    scored = client.completions.create(**asked, max_tokens=0)
    [choice] = scored.choices
    assert (choice.text, choice.finish_reason) == (LONG, "length")
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert scored.usage.total_tokens == scored.usage.prompt_tokens
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == scored.usage.prompt_tokens
    more = client.completions.create(**asked, max_tokens=2).choices[0].logprobs
    assert more is not None
    assert more.token_logprobs is not None
    count = scored.usage.prompt_tokens
    assert close([*choice.logprobs.token_logprobs], [*more.token_logprobs[:count]])
    found, usage = joined(client, **asked, max_tokens=0)
    assert (found[0].text, len(found[0].tokens), found[0].finish) == (LONG, count, "length")
    assert usage.completion_tokens == 0
    bare = client.completions.create(model=MODEL, prompt="ab", echo=True, max_tokens=0)
    assert (bare.choices[0].text, bare.choices[0].logprobs) == ("ab", None)


def test_echo_with_batches_and_choices(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": [PROMPT, "another one", PROMPT],
        "n": 3,
        "max_tokens": 4,
        "seed": 5,
        "echo": True,
        "logprobs": 1,
    }
    answer = client.completions.create(**asked)
    found, usage = joined(client, **asked)
    assert answer.usage is not None
    assert usage.prompt_tokens == answer.usage.prompt_tokens
    assert usage.completion_tokens == answer.usage.completion_tokens
    assert sorted(found) == [choice.index for choice in answer.choices] == list(range(9))
    for choice in answer.choices:
        assert choice.text.startswith(asked["prompt"][choice.index // 3])
        assert choice.logprobs is not None
        assert found[choice.index].text == choice.text
        assert found[choice.index].tokens == choice.logprobs.tokens
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
    assert [c.text for c in answer.choices[:3]] == [c.text for c in answer.choices[6:]]
    tokens = client.completions.create(**{**asked, "prompt": [[97, 98], [99]], "n": 1})
    assert [len(c.logprobs.tokens or []) for c in tokens.choices if c.logprobs] == [6, 5]


class Thing(pydantic.BaseModel):
    ok: bool
    n: int


def test_a_schema_is_obeyed_on_every_leg(client: openai.OpenAI) -> None:
    for prompt in ("a", LONG):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=user(prompt),
            max_tokens=200,
            seed=4,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
            },
        )
        [choice] = answer.choices
        assert choice.finish_reason == "stop", choice
        value = json.loads(choice.message.content or "")
        assert sorted(value) == ["name", "ok"]
        assert isinstance(value["ok"], bool)
        assert len(value["name"]) <= 8


def test_the_clients_own_types_are_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=user("x"), max_tokens=300, temperature=0.0, response_format=Thing,
        logit_bias={str(ord("}")): 10},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_json_object_is_json(client: openai.OpenAI) -> None:
    text = ""
    finish = None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=user("x"),
        max_tokens=60,
        response_format={"type": "json_object"},
        logit_bias={str(ord("}")): 20},
        stream=True,
    ):
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason
    assert text.lstrip().startswith("{")
    if finish == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_obeyed_is_a_400_at_once(
    client: openai.OpenAI, served: Fleet, stream: bool
) -> None:
    retries = served.metric("baton_events_total", kind="retry")
    for prompt in ("a", LONG):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model=MODEL,
                messages=user(prompt),
                max_tokens=5,
                n=2,
                stream=stream,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "nonsense"}},
                },
            )
        assert (error.value.code, error.value.param) == ("invalid_request", "response_format")
    assert served.metric("baton_events_total", kind="retry") == retries


def test_penalties_and_bias_are_taken(client: openai.OpenAI) -> None:
    for fields in (
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"logit_bias": {str(ord("a")): -100}},
        {"extra_body": {"min_p": 0.2, "repetition_penalty": 1.3, "min_tokens": 2}},
        {"best_of": 1},
    ):
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 1}
        assert client.completions.create(**asked, **fields).choices[0].finish_reason


def prefilled(fleet: Fleet) -> list[int]:
    """Tokens that each prefill worker has computed."""
    names = [process.name for process in fleet.processes if process.role == "prefill"]
    ports = [re.findall(r"metrics url=\S+:(\d+)/", fleet.process(n).log.read_text()) for n in names]
    name = "baton_worker_tokens_total"
    return [int(fleet.metric(name, int(port), kind="prefilled")) for [port] in ports]


def test_choices_of_one_prompt_compute_it_once(client: openai.OpenAI, served: Fleet) -> None:
    before = prefilled(served)
    prompt = "a prompt that nobody has asked before " * 20
    answer = client.completions.create(model=MODEL, prompt=prompt, n=6, max_tokens=4, seed=9)
    assert [choice.index for choice in answer.choices] == list(range(6))
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0  # it was new
    counts = [now - then for now, then in zip(prefilled(served), before, strict=True)]
    assert sorted(counts)[:-1] == [0] * (len(counts) - 1)
    assert usage.prompt_tokens <= max(counts) <= usage.prompt_tokens + 5 * MAX_BLOCK


def test_equal_prompts_of_a_batch_compute_it_once(client: openai.OpenAI, served: Fleet) -> None:
    before = prefilled(served)
    prompt = "neither has anybody asked for this " * 20
    answer = client.completions.create(model=MODEL, prompt=[prompt] * 4, max_tokens=4, seed=9)
    assert len({choice.text for choice in answer.choices}) == 1
    assert answer.usage is not None
    once = answer.usage.prompt_tokens // 4
    counts = [now - then for now, then in zip(prefilled(served), before, strict=True)]
    assert once <= sum(counts) <= once + 3 * MAX_BLOCK

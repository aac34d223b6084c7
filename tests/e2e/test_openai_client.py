"""The unmodified `openai` client against a fleet: it is served, and finds what it reads."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.e2e.fleet import MODEL, Fleet

pytestmark = pytest.mark.xdist_group("api")


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{fleet.base_url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


@pytest.fixture
async def aclient(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{fleet.base_url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


def user(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    [model] = [m for m in client.models.list() if m.id == MODEL]
    assert (model.object, model.owned_by) == ("model", "baton")
    assert abs(model.created - time.time()) < 3600
    assert client.models.retrieve(MODEL) == model


def test_chat_answers_in_one_piece(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("hello"), max_tokens=7)
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert len(choice.message.content) == 7
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")


def test_max_completion_tokens_wins_over_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("hello"), max_tokens=9, max_completion_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_a_streamed_chat_is_the_same_text_in_chunks(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": user("stream me"),
        "max_tokens": 12,
        "seed": 5,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:]] == [None] * (len(chunks) - 1)
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert len(chunks) > 4  # token by token, not in one lump


def test_the_stream_helper_works(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("helper"), max_tokens=6
    ) as stream:
        events = [event.type for event in stream]
    assert events.count("content.delta") > 2
    assert events.count("content.done") == 1


def test_the_stream_helper_ends_at_a_stop(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("helper"), max_tokens=60, stop=" "
    ) as stream:
        done = stream.get_final_completion()
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content
    assert " " not in done.choices[0].message.content


@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_comes_in_a_chunk_without_choices_if_asked(
    client: openai.OpenAI, include_usage: bool
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=user("count"),
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": include_usage},
        )
    )
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    if not include_usage:
        assert usages == []
        return
    [usage] = usages
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (usage.completion_tokens, usage.total_tokens - usage.prompt_tokens) == (4, 4)
    assert usage.prompt_tokens_details is not None


def test_a_completion_of_text_and_of_its_ids_is_the_same(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="abc", max_tokens=9, seed=1)
    ids = client.completions.create(model=MODEL, prompt=[256, *b"abc"], max_tokens=9, seed=1)
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage == ids.usage
    assert text.usage is not None
    assert text.usage.prompt_tokens == 4


def test_an_answer_without_a_limit_ends_all_the_same(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 1024


def test_batches_number_their_choices_prompt_by_prompt(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "seed": 3}
    one = [client.completions.create(prompt=p, n=2, **asked) for p in ("first", "second!")]
    both = client.completions.create(prompt=["first", "second!"], n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices] == [c.text for a in one for c in a.choices]
    assert len({c.text for c in both.choices}) == 4
    assert both.usage is not None
    assert both.usage.prompt_tokens == 6 + 8  # a prompt counts once, however many choices
    assert both.usage.completion_tokens == 20
    ids = client.completions.create(prompt=[[256, *b"first"], [256, *b"second!"]], n=2, **asked)
    assert [c.text for c in ids.choices] == [c.text for c in both.choices]


def test_streamed_choices_of_a_batch_are_told_apart(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["first", "second!"],
        "n": 2,
        "max_tokens": 5,
        "seed": 3,
    }
    whole = client.completions.create(**asked)
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("stop", [" ", [" ", "never"]])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, stop: str) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": "stop at a space",
        "max_tokens": 40,
        "seed": 2,
    }
    free = client.completions.create(**asked).choices[0].text
    answer = client.completions.create(**asked, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == free.partition(" ")[0]
    streamed = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_its_absence_does_not(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> str:
        answer = client.completions.create(model=MODEL, prompt="dice", seed=seed, max_tokens=30)
        return answer.choices[0].text

    assert ask(7) == ask(7)
    assert ask(None) != ask(None)
    assert ask(-1) == ask(-1)


def test_a_repeated_long_prompt_is_found_in_the_cache(client: openai.OpenAI, fleet: Fleet) -> None:
    prompt = "a long prompt that has been seen before; " * 40

    def cached() -> int:
        usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() >= len(prompt) // 2
    fleet.until_idle()


def test_errors_have_the_class_of_their_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=[], max_tokens=1)
    assert (bad.value.param, bad.value.type) == ("messages", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody/has-it", messages=user("x"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/has-it")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="no such endpoint")
    request_id = bad.value.response.headers["x-request-id"]
    assert request_id in bad.value.message


def test_when_its_workers_have_gone_a_model_is_unavailable(fleet: Fleet) -> None:
    """Not unknown: a 503, at once or after the queue's deadline, that asks to try again."""
    router = fleet.add_router("impatient", "--queue-timeout-ms=300")
    name = "lonely"
    fleet.add_worker("lonely-0", "both", f"--served-model-name={name}")
    url = f"http://127.0.0.1:{router.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        fleet.until(lambda: "lonely-0" in fleet.eligible(router.port), what="both to see it")
        assert client.completions.create(model=name, prompt="x", max_tokens=2).choices[0].text
        assert name in [model.id for model in client.models.list()]
        assert fleet.stop_extra("lonely-0") == 0
        fleet.until(
            lambda: "lonely-0" not in fleet.eligible(router.port), what="the worker to be missed"
        )
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as gone:
            client.completions.create(model=name, prompt="x", max_tokens=2)
    assert gone.value.status_code == 503
    assert gone.value.code in ("no_decode_worker", "queue_timeout")
    assert int(gone.value.response.headers["retry-after"]) >= 1
    assert time.monotonic() - began < 1.0
    assert fleet.stop_extra("impatient") == 0


async def test_async_chat_and_stream(aclient: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": user("async"), "max_tokens": 8, "seed": 4}
    whole = await aclient.chat.completions.create(**asked)
    text = ""
    async for chunk in await aclient.chat.completions.create(**asked, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


async def test_a_closed_stream_frees_everything(aclient: openai.AsyncOpenAI, fleet: Fleet) -> None:
    stream = await aclient.completions.create(
        model=MODEL, prompt="never ending", max_tokens=20_000, stream=True, n=3
    )
    async for _ in stream:
        break
    assert fleet.cluster_info()["inflight"] == 3
    assert fleet.metric("baton_inflight_choices", model=MODEL) == 3
    await stream.close()
    fleet.until(lambda: fleet.cluster_info()["inflight"] == 0, what="cancel", timeout_s=0.5)
    fleet.until_idle(timeout_s=1.5)  # workers report twice a second
    assert fleet.metric("baton_inflight_choices", model=MODEL) == 0
    assert fleet.metric("baton_choices_total", outcome="cancelled") >= 3


def test_a_request_id_names_the_story_of_a_request(client: openai.OpenAI, fleet: Fleet) -> None:
    answer = client.completions.with_raw_response.create(
        model=MODEL, prompt="tell", max_tokens=2, extra_headers={"x-request-id": "my-id_1"}
    )
    assert answer.headers["x-request-id"] == "my-id_1"
    assert answer.parse().id == "cmpl-my-id_1"
    status, body = fleet.get("/debug/requests/my-id_1")
    assert status == 200
    assert json.loads(body)["choices"][0]["story"][-1]["what"] == "end completed"

import json
import math
from typing import Any

import pytest

from protocol.errors import ClientError
from protocol.openai import ChatRequest, CompletionRequest, decode_chat, decode_completion
from protocol.sampling import Sampling
from router.sampling_options import Defaults, read_defaults, resolve

VOCAB = 300


def completion(**fields: Any) -> CompletionRequest:
    return decode_completion(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return decode_chat(json.dumps({"model": "m", "messages": [], **fields}).encode())


def text(**fields: Any) -> Sampling:
    return resolve(completion(**fields), Defaults(), VOCAB, "")


def test_what_is_not_said_changes_no_distribution() -> None:
    assert text() == Sampling(1)


def test_every_field_reaches_the_wire() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "logit_bias": {"0": 1, "299": -100.0},
        "logprobs": 3,
        "min_tokens": 4,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "stop": ["x"],
        "stop_token_ids": [5],
    }
    wire = resolve(completion(**fields), Defaults(), VOCAB, "{}")
    assert wire == Sampling(
        max_tokens=1,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        stop=["x"],
        stop_token_ids=[5],
        min_tokens=4,
        ignore_eos=True,
        include_stop=True,
        skip_special_tokens=False,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={0: 1.0, 299: -100.0},
        logprobs=3,
        grammar="{}",
    )


def test_the_model_sets_what_the_client_does_not() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1}
    defaults = read_defaults({**config, "repetition_penalty": 1.1, "max_new_tokens": 9})
    wire = resolve(completion(), defaults, VOCAB, "")
    assert (wire.temperature, wire.top_p, wire.top_k) == (0.6, 0.9, 40)
    assert (wire.min_p, wire.repetition_penalty, defaults.max_tokens) == (0.1, 1.1, 9)
    said = completion(min_p=0, repetition_penalty=1, temperature=0, top_p=1, top_k=0)
    assert resolve(said, defaults, VOCAB, "") == Sampling(1, temperature=0.0)


def test_a_greedy_model_is_greedy() -> None:
    assert read_defaults({"do_sample": False, "top_k": 5}) == Defaults(temperature=0.0)


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.5},
        {"min_p": True},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_what_a_models_folder_says_wrongly_is_not_the_clients(config: dict[str, Any]) -> None:
    assert read_defaults(config) == Defaults()


BAD: list[tuple[str, Any]] = [
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 2.01),
    ("presence_penalty", 2.01),
    ("presence_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("frequency_penalty", -2.01),
    ("temperature", 2.01),
    ("top_p", 0),
    ("top_k", -2),
    ("logit_bias", {"300": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"": 1}),
    ("logit_bias", {"1.0": 1}),
    ("logit_bias", {" 1": 1}),
    ("logit_bias", {"²": 1}),
    ("logit_bias", {"٣": 1}),
    ("logit_bias", {"9" * 10_000: 1}),
    ("logit_bias", {"1": 100.5}),
    ("logit_bias", {"1": -101}),
    ("logit_bias", {f"{'0' * (i // 300)}{i % 300}": 1 for i in range(1025)}),
    ("logprobs", -1),
    ("logprobs", 21),
    ("stop_token_ids", [300]),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:30])
def test_what_is_outside_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ClientError) as error:
        text(**{name: value})
    assert (error.value.status, error.value.code) == (400, "invalid_value")
    assert error.value.param == name
    assert name in error.value.message
    assert len(error.value.message) < 200


EDGES: list[tuple[str, Any]] = [
    ("min_p", 1),
    ("repetition_penalty", 2),
    ("repetition_penalty", 0.001),
    ("presence_penalty", 2),
    ("frequency_penalty", -2),
    ("logit_bias", {}),
    ("logit_bias", {"007": 100}),
    ("logprobs", 20),
    ("logprobs", 0),
]


@pytest.mark.parametrize(("name", "value"), EDGES, ids=lambda value: str(value)[:30])
def test_what_is_just_inside_is_taken(name: str, value: Any) -> None:
    text(**{name: value})


@pytest.mark.parametrize(
    ("fields", "wire"),
    [
        ({}, -1),
        ({"logprobs": None}, -1),
        ({"logprobs": False}, -1),
        ({"logprobs": False, "top_logprobs": 0}, -1),
        ({"top_logprobs": 0}, -1),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
    ids=str,
)
def test_a_chat_says_whether_and_how_many(fields: dict[str, Any], wire: int) -> None:
    assert resolve(chat(**fields), Defaults(), VOCAB, "").logprobs == wire


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 1},
        {"logprobs": False, "top_logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
    ],
    ids=str,
)
def test_top_logprobs_go_with_logprobs_and_are_few(fields: dict[str, Any]) -> None:
    with pytest.raises(ClientError) as error:
        resolve(chat(**fields), Defaults(), VOCAB, "")
    assert (error.value.status, error.value.param) == (400, "top_logprobs")

"""vLLM's JSON: every sampling option has a place or is refused, and chunks are read at any cut."""

import json

import msgspec
import pytest

from protocol.out import TokenLogprob
from protocol.sampling import Sampling
from worker.engine.vllm.wire import (
    Choice,
    EventLines,
    Logprobs,
    Unmappable,
    WireError,
    decode_answer,
    decode_body,
    prefill_body,
    token_logprobs,
)

UNSENT = {"stop", "include_stop", "skip_special_tokens"}
"""The text is ours."""
NAMES = {"grammar": "structured_outputs"}


def body(sampling: Sampling, num_output: int = 0, max_new: int = 9) -> dict[str, object]:
    return decode_body(
        "m", [1, 2], sampling, num_output=num_output, max_new=max_new, cache_salt="x"
    )


CHANGED = {
    "temperature": 0.3, "top_p": 0.9, "top_k": 5, "seed": 77, "stop_token_ids": [4],
    "min_tokens": 2, "ignore_eos": True, "min_p": 0.1, "repetition_penalty": 1.2,
    "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {3: 1.5}, "logprobs": 4,
    "grammar": '{"type":"object"}', "stop": ["a"], "include_stop": True,
    "skip_special_tokens": False,
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(CHANGED))
def test_every_option_is_said_or_is_ours(field: str) -> None:
    plain = body(Sampling(9))
    said = body(Sampling(9, **{field: CHANGED[field]}))  # type: ignore[arg-type]
    changed = {key for key in said if said[key] != plain.get(key)}
    if field in UNSENT:
        assert not changed
    else:
        assert NAMES.get(field, field) in changed


def test_no_field_of_sampling_is_forgotten() -> None:
    """A new one must be mapped, or be said to be ours, here."""
    elsewhere = {"max_tokens", "prompt_logprobs"}
    assert set(Sampling.__struct_fields__) == CHANGED.keys() | elsewhere


def test_a_resume_says_what_is_left() -> None:
    said = body(Sampling(9, min_tokens=6, seed=7), num_output=4, max_new=5)
    assert (said["max_tokens"], said["min_tokens"]) == (5, 2)
    assert said["seed"] not in (7, body(Sampling(9, seed=7), num_output=3)["seed"])
    assert body(Sampling(9, min_tokens=6), num_output=8)["min_tokens"] == 0


def test_a_grammar_cannot_be_resumed() -> None:
    with pytest.raises(Unmappable, match="grammar"):
        body(Sampling(9, grammar="{}"), num_output=1)


def test_no_salt_is_no_field() -> None:
    assert "cache_salt" not in prefill_body("m", [1], cache_salt="")
    assert prefill_body("m", [1], cache_salt="s")["cache_salt"] == "s"


STREAM = (
    b'data: {"choices":[{"index":0,"text":"a","token_ids":[341]}]}\r\n\n'
    b": a comment\n\ndata: " + json.dumps({"choices": [{"text": "ü"}]}).encode() + b"\n\n"
    b"data: [DONE]\n\ndata: late\n\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_at_any_cut(size: int) -> None:
    lines = EventLines()
    found = []
    for start in range(0, len(STREAM), size):
        if not lines.is_done:
            found += list(lines.feed(STREAM[start : start + size]))
    assert len(found) == 2
    assert lines.is_done
    assert decode_answer(found[0]).choices[0].token_ids == [341]


def test_a_line_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.vllm.wire.MAX_LINE_BYTES", 100)
    lines = EventLines()
    assert not list(lines.feed(b"x" * 90))
    with pytest.raises(WireError, match="100 bytes"):
        list(lines.feed(b"x" * 50))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff"]
    + [b'{"choices":[{"token_ids":[%b]}]}' % token for token in (b'"x"', b"-1", b"4294967296")],
)
def test_rubbish_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(data)


def test_logprobs_are_named_by_id_and_cut_to_what_was_asked() -> None:
    said = Logprobs(
        tokens=["token_id:5"],
        token_logprobs=[-3.0],
        top_logprobs=[{"token_id:5": -3.0, "token_id:8": -0.5, "token_id:9": -1.0}],
    )
    choice = Choice(token_ids=[5], logprobs=said)
    assert token_logprobs(choice, 2) == [TokenLogprob(-3.0, [(8, -0.5), (9, -1.0)])]
    assert token_logprobs(choice, 0) == [TokenLogprob(-3.0, [])]
    assert token_logprobs(Choice(token_ids=[5, 6]), 0) == [None, None]
    named = msgspec.structs.replace(said, top_logprobs=[{"word": -0.5}])
    with pytest.raises(WireError, match="word"):
        token_logprobs(Choice(token_ids=[5], logprobs=named), 1)

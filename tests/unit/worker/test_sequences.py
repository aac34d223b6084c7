"""When a choice ends, what its text is, and what cannot run at all."""

import pytest

from protocol.jobs import Body
from protocol.out import Delta
from protocol.sampling import Sampling
from tests.unit.worker.engine_world import new_key, prompt_of
from text.assets import byte_assets
from text.tokenizer import Tokenizer
from worker.engine.base import DecodeJob, PrefillJob
from worker.engine.sequences import (
    ActiveSequence,
    ModelLimits,
    SequenceRefused,
    build_sequence,
)

LIMITS = ModelLimits("model", 4, 262, 30, frozenset({257}))
TOKENIZER = Tokenizer.from_assets(byte_assets())
EOS = 257


def decoding(
    sampling: Sampling, output: str = "", chars_sent: int = 0, *, num_prompt: int = 3
) -> ActiveSequence:
    job = DecodeJob(
        new_key(), "c/0", prompt_of(num_prompt), sampling, None, list(output.encode()), chars_sent
    )
    return build_sequence(job, LIMITS, TOKENIZER, serial=1, now=0.0)


def take(sequence: ActiveSequence, text: str) -> list[tuple[str, str, str | int | None]]:
    deltas = [sequence.take(token) for token in text.encode()]
    return [(delta.text, delta.finish, delta.stop) for delta in deltas]


def test_text_that_may_become_a_stop_string_comes_with_the_last_token() -> None:
    sequence = decoding(Sampling(max_tokens=4, stop=["def"]))
    assert take(sequence, "abde") == [
        ("a", "", None),
        ("b", "", None),
        ("", "", None),
        ("de", "length", None),
    ]


def test_half_a_character_comes_with_the_last_token() -> None:
    sequence = decoding(Sampling(max_tokens=2))
    assert [sequence.take(token).text for token in (97, 0xC3)] == ["a", "\ufffd"]


def test_held_text_comes_with_the_end_token() -> None:
    sequence = decoding(Sampling(max_tokens=9, stop=["def"]))
    take(sequence, "de")
    end = sequence.take(EOS)
    assert (end.ids, end.text, end.finish, end.stop) == ([EOS], "de", "stop", None)


def test_text_that_was_held_and_not_sent_comes_with_the_next_token() -> None:
    sequence = decoding(Sampling(max_tokens=9), "abc", 1)
    assert take(sequence, "d") == [("bcd", "", None)]
    half = decoding(Sampling(max_tokens=9, stop=["def"]), "abde", 2)
    assert take(half, "x") == [("dex", "", None)]


def test_stop_string_across_the_legs_is_found() -> None:
    sequence = decoding(Sampling(max_tokens=9, stop=["def"]), "abde", 2)
    assert take(sequence, "f") == [("", "stop", "def")]


def test_end_and_stop_ids_do_not_count_below_min_tokens() -> None:
    sampling = Sampling(max_tokens=9, min_tokens=2, stop_token_ids=[120], stop=["x"])
    sequence = decoding(sampling)
    assert take(sequence, "xxx") == [("x", "", None), ("x", "", None), ("", "stop", 120)]
    sequence = decoding(Sampling(max_tokens=9, min_tokens=1))
    assert [sequence.take(EOS).finish for _ in range(2)] == ["", "stop"]


def test_ignored_end_is_a_token_like_any_other() -> None:
    sequence = decoding(Sampling(max_tokens=2, ignore_eos=True))
    assert [sequence.take(EOS).finish for _ in range(2)] == ["", "length"]


def test_stop_id_is_shown_if_asked_for() -> None:
    sequence = decoding(Sampling(max_tokens=9, stop_token_ids=[120], include_stop=True))
    assert take(sequence, "ax")[1] == ("x", "stop", 120)


@pytest.mark.parametrize(
    ("sampling", "output", "chars_sent", "end"),
    [
        (Sampling(max_tokens=9, stop=["cd"]), "abcd", 1, ("b", "stop", "cd")),
        (Sampling(max_tokens=4), "abcd", 3, ("d", "length", None)),
        (Sampling(max_tokens=4, stop=["de"]), "abcd", 3, ("d", "length", None)),
        (Sampling(max_tokens=9, stop_token_ids=[100]), "abcd", 3, ("d", "stop", 100)),
        (Sampling(max_tokens=9, stop_token_ids=[100], min_tokens=4), "abcd", 4, None),
        (Sampling(max_tokens=9), "abcd", 4, None),
    ],
)
def test_given_output_may_be_the_end_already(
    sampling: Sampling, output: str, chars_sent: int, end: tuple[str, str, object] | None
) -> None:
    sequence = decoding(sampling, output, chars_sent)
    found = sequence.end_of_given()
    if end is None:
        assert found is None
    else:
        assert found == Delta(sequence.key.attempt, 4, [], *end)  # type: ignore[arg-type]


def test_context_ends_a_choice() -> None:
    sequence = decoding(Sampling(max_tokens=99), num_prompt=28)
    assert [one[1] for one in take(sequence, "ab")] == ["", "length"]


def test_hashes_of_a_growing_sequence_are_those_of_the_whole() -> None:
    sequence = decoding(Sampling(max_tokens=99))
    for _ in range(3):
        take(sequence, "abcde")
        sequence.hash_full_blocks()
    whole = decoding(Sampling(max_tokens=99), "abcde" * 3, 15)
    assert sequence.hash_full_blocks() == whole.hash_full_blocks()
    assert len(whole.hashes) == 4
    assert sequence.content_hash(7) == decoding(Sampling(max_tokens=99), "abcd", 4).content_hash(7)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (Body("chat", b"{}"), "invalid_request"),
        ([], "invalid_request"),
        ([262], "invalid_request"),
        ([-1], "invalid_request"),
        ([1 << 40], "invalid_request"),
        (prompt_of(30), "context_length"),
    ],
)
def test_impossible_jobs_are_refused(prompt: list[int] | Body, code: str) -> None:
    job = PrefillJob(new_key(), "c/0", prompt, Sampling(max_tokens=9))
    with pytest.raises(SequenceRefused) as caught:
        build_sequence(job, LIMITS, TOKENIZER, serial=1, now=0.0)
    assert caught.value.code == code

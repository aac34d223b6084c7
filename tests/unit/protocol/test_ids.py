"""Names of choices and jobs, and what may stand in a subject."""

import pytest

from protocol.ids import JobKey, choice_id, is_name, request_of


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 64, "0"])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", "a b", "*", ">", "a\n", "é", "a/b", "٣"])
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)


def test_a_choice_is_named_after_its_request() -> None:
    assert choice_id("chatcmpl-1", 3) == "chatcmpl-1/3"
    assert request_of("chatcmpl-1/3") == "chatcmpl-1"
    assert request_of(choice_id("client/made/this", 0)) == "client/made/this"


def test_a_job_key_is_its_values() -> None:
    assert JobKey("r", 1) == ("r", 1)
    assert JobKey("r", 1) != JobKey("s", 1)

import re
from pathlib import Path

import pytest

import router.scheduling
from protocol.errors import error_type
from router.outcomes import OUTCOMES, client_error
from router.scheduling.commands import EndChoice


def test_the_leg_is_named_unless_it_is_the_queue() -> None:
    error = client_error(EndChoice("r/0", "failed", "decode", "worker_failed", "it broke"))
    assert (error.status, error.code) == (502, "worker_failed")
    assert error.message == "it broke [leg: decode]"
    error = client_error(EndChoice("r/0", "rejected", "queue", "queue_full"))
    assert (error.status, error.message) == (503, "queue full")


def test_the_scheduler_knows_better_when_to_try_again() -> None:
    assert client_error(EndChoice("r/0", "rejected", "queue", "queue_full")).retry_after_s == 1
    told = client_error(EndChoice("r/0", "rejected", "queue", "queue_full", retry_after_s=9))
    assert told.retry_after_s == 9


def test_what_a_worker_cannot_obey_is_named_and_nothing_else_is() -> None:
    end = EndChoice("r/0", "failed", "prefill", "invalid_request", "no such keyword")
    told = client_error(end, "response_format")
    assert (told.status, told.param) == (400, "response_format")
    assert "no such keyword" in told.message
    assert client_error(end).param is None
    died = EndChoice("r/0", "failed", "decode", "worker_failed")
    assert client_error(died, "response_format").param is None


def test_an_unknown_code_is_our_fault() -> None:
    assert client_error(EndChoice("r/0", "failed", "decode", "no_such_code")).status == 500


@pytest.mark.parametrize("code", OUTCOMES)
def test_every_status_has_a_type_and_only_what_passes_asks_to_try_again(code: str) -> None:
    told = OUTCOMES[code]
    assert told.status in (400, 404, 499, 500, 502, 503, 504)
    assert error_type(told.status)
    assert (told.retry_after_s is not None) == (told.status in (502, 503))


def test_the_table_has_every_code_that_the_scheduler_ends_a_choice_with() -> None:
    folder = Path(router.scheduling.__path__[0])
    ends = re.compile(
        r'(?:\bend|\bfail|EndChoice)\([^()]*?"(?:rejected|expired|failed|cancelled)",\s*"(\w+)"'
    )
    legs = {"queue", "prefill", "transfer", "decode", "request"}
    found = {code for file in folder.glob("*.py") for code in ends.findall(file.read_text())} - legs
    assert len(found) >= 5
    assert found <= set(OUTCOMES)

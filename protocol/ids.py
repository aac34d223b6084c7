"""The names of things on the wire, and which of them may become part of a subject.

A *request* is one client call; a *choice* is one answer of it, `<request>/<i>`; a *job* is one leg
(prefill or decode) of one *attempt*. Attempt numbers are drawn from one counter per router process,
so `(router, attempt)` names an attempt of a choice on its own, and a router that restarts (a new
router id) can never be confused with the one before.
"""

import re
from typing import Final, NamedTuple

MAX_NAME: Final = 64
_NAME: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME}}}")


class JobKey(NamedTuple):
    """Names one attempt in a worker: who asked, and the asker's number for it."""

    router: str
    attempt: int


def is_name(text: str) -> bool:
    """True if `text` may stand in a subject or a registry key: no dots, blanks or wildcards."""
    return _NAME.fullmatch(text) is not None


def choice_id(request_id: str, index: int) -> str:
    return f"{request_id}/{index}"


def request_of(choice: str) -> str:
    return choice.rpartition("/")[0]

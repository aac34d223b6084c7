"""docs/api.md lists every error that a client can get, with its status."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import router
from router.http import HTTP_CODES
from router.outcomes import OUTCOMES

ROOT = Path(router.__path__[0]).parent
ROW = re.compile(r"^\| (\d{3}) \| (`[^|]*`) \|", re.MULTILINE)


def listed() -> set[tuple[int, str]]:
    text = (ROOT / "docs" / "api.md").read_text()
    return {
        (int(status), code)
        for status, codes in ROW.findall(text)
        for code in re.findall(r"`([a-z_]+)`", codes)
    }


def raised() -> Iterator[tuple[int, str]]:
    """What the source says: `ClientError(status, ..., code=...)`."""
    for folder in ("protocol", "text", "router"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "ClientError"):
                    continue
                codes = [word.value for word in node.keywords if word.arg == "code"]
                for code in codes:
                    for word in ast.walk(code):
                        if isinstance(word, ast.Constant) and isinstance(
                            node.args[0], ast.Constant
                        ):
                            yield int(str(node.args[0].value)), str(word.value)


def test_the_page_lists_every_code_and_no_other() -> None:
    found = set(raised())
    assert len(found) > 20
    found |= {(told.status, code) for code, told in OUTCOMES.items()}
    found |= set(HTTP_CODES.items())
    assert listed() == found


def test_what_may_pass_says_when_to_come_again() -> None:
    assert all(
        (told.retry_after_s is not None) == (told.status in (502, 503))
        for told in OUTCOMES.values()
    )

"""Every cause is counted on its own: each word with which the code ends, moves, refuses or blames
something has a series of its own, and no word of others makes one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry

import router
import worker
from protocol.out import FailureCode
from router import claims
from router.metrics import RouterMetrics
from router.outcomes import OUTCOMES
from router.scheduling import commands as cmd
from tests.unit.router.dispatch_world import dispatching

SCHEDULING = Path(router.__path__[0]) / "scheduling"
KINDS = get_args(cmd.Note.__annotations__["kind"])
LABEL = re.compile(r"[a-z][a-z0-9_]*")
_TAKES_CAUSE = {
    "move": 1, "suspect": 1, "_remove": 1, "_fall_silent": 1, "_evacuate": 1, "lose_source": 1,
    "requeue": 1, "_rewait": 1, "note_late": 0,
}  # fmt: skip
"""Methods of the scheduler's parts, and which argument is the cause."""


def _words(node: ast.expr) -> list[str]:
    """The constants that an argument may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return _words(node.body) + _words(node.orelse)
    return []


def _calls() -> Iterator[ast.Call]:
    for file in sorted(SCHEDULING.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield node


def causes() -> set[str]:
    """What the scheduler's own source says, and the failures that workers may name."""
    found = set(get_args(FailureCode))
    for call in _calls():
        name = ast.unparse(call.func).rpartition(".")[2]
        at = 1 if name == "Note" else _TAKES_CAUSE.get(name)
        if at is not None and at < len(call.args):
            found.update(_words(call.args[at]))
    return found - {"start_prefill", "start_local", "start_pull", "lend", "decode", "rewait", "end"}


def test_the_causes_are_found() -> None:
    found = causes()
    assert {"gap", "stall", "accept_timeout", "replaced", "unlisted", "no_replay", "gone"} <= found
    assert len(found) > 20
    assert all(LABEL.fullmatch(cause) for cause in found)


async def test_each_cause_of_each_kind_has_a_series_of_its_own() -> None:
    async with dispatching() as world:
        pairs = [(kind, cause) for kind in KINDS for cause in sorted(causes())]
        for kind, cause in pairs:
            world.dispatch._note(cmd.Note(kind, cause, "w"))
        for kind, cause in pairs:
            labels = {"kind": kind, "cause": cause}
            value = world.metrics.registry.get_sample_value("baton_events_total", labels)
            assert value == 1.0, labels


@pytest.mark.parametrize("code", OUTCOMES)
def test_each_outcome_code_has_a_series_of_its_own(code: str) -> None:
    metrics = RouterMetrics(CollectorRegistry())
    for other in OUTCOMES:
        metrics.started("m")
        metrics.ended("m", "failed", "decode", other, 1.0)
    labels = {"model": "m", "outcome": "failed", "leg": "decode", "code": code}
    assert metrics.registry.get_sample_value("baton_choices_total", labels) == 1.0


def test_reasons_of_refusals_are_those_that_workers_give() -> None:
    """Read from the workers' source: a new reason needs a label here."""
    given = set()
    for name in ("service.py", "main.py"):
        source = (Path(worker.__path__[0]) / name).read_text()
        given |= set(re.findall(r'\brefuse\("(\w+)"\)', source))
        given |= set(re.findall(r'return "(\w+)"(?:$| if self.outbox.num_open)', source, re.M))
    assert {"draining", "wrong_role", "full"} <= given
    assert given <= claims.REFUSALS
    assert [claims.refusal(reason) for reason in sorted(given)] == sorted(given)


def test_every_refusal_before_admission_has_a_code_and_few_of_them() -> None:
    """Codes are words of our own source, never of a client."""
    codes = set()
    for file in Path(router.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ClientError":
                [given] = [word.value for word in node.keywords if word.arg == "code"]
                codes.update(_words(given))
    assert {"invalid_api_key", "body_too_large", "model_not_found", "queue_full"} <= codes
    metrics = RouterMetrics(CollectorRegistry())
    for code in codes:
        metrics.error_answer(400, code)
    series = [s for m in metrics.errors.collect() for s in m.samples if s.name.endswith("_total")]
    assert len(series) == len(codes) < 100

"""The worker that streams dies: log-probabilities go on where they were, none lost, none twice."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.fleet import MODEL, Fleet

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(90)]

SETTINGS = ("worker.sim_step_ms=20", "router.stall_timeout_ms=3000", "worker.lease_ms=3000")
PROMPT = "the quick brown fox jumps over the lazy dog and " * 8
NUM_TOKENS = 80


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("dying"), decode=2, settings=SETTINGS) as fleet:
        yield fleet


def streaming(fleet: Fleet) -> str:
    """The decode worker that has the one choice there is."""

    def names() -> list[str]:
        return [
            worker["worker_id"]
            for worker in fleet.cluster_info()["workers"]
            if worker["role"] == "decode" and worker["reservations"]
        ]

    [name] = fleet.until(names, what="a decode worker")
    return str(name)


def kill(fleet: Fleet, name: str, number: signal.Signals) -> None:
    if number == signal.SIGKILL:
        fleet.kill(name)
    else:
        os.kill(fleet.process(name).pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_every_token_has_its_entry_once_whoever_died(fleet: Fleet, number: signal.Signals) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": f"{number} {PROMPT}",
        "max_tokens": NUM_TOKENS,
        "extra_body": {"ignore_eos": True},
        "seed": 3,
        "logprobs": 2,
        "echo": True,
        "stop": ["never to be seen"],
    }
    url = f"{fleet.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        answer = client.completions.create(**asked)
        [whole] = answer.choices
        assert whole.logprobs is not None
        assert answer.usage is not None
        assert answer.usage.completion_tokens == NUM_TOKENS
        assert len(whole.logprobs.tokens or []) == answer.usage.total_tokens
        resumed = fleet.metric("baton_events_total", kind="resume")
        text, victim = "", ""
        found: dict[str, list[Any]] = {}
        for chunk in client.completions.create(**asked, stream=True):
            [choice] = chunk.choices
            text += choice.text
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                found.setdefault(name, []).extend(getattr(choice.logprobs, name) or [])
            if not victim and len(found["tokens"]) > answer.usage.prompt_tokens + 20:
                victim = streaming(fleet)
                kill(fleet, victim, number)
    assert fleet.metric("baton_events_total", kind="resume") > resumed
    assert text == whole.text
    for name, values in found.items():
        assert values == getattr(whole.logprobs, name), name
    if number == signal.SIGSTOP:
        os.kill(fleet.process(victim).pid, signal.SIGCONT)
    fleet.mend("decode-0", "decode-1")
    fleet.until_idle(timeout_s=8)

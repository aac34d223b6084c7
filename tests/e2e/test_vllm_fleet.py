"""Workers beside stand-ins for vLLM, behind a real router: what a client gets, also when a server
dies under its stream. `tests/vllm` does the like with real servers, of which it has only two.
"""

import http.client
import json
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton.demo import demo_model_folder
from tests.e2e.fleet import Fleet
from tests.unit.worker.vllm.vllm_world import PROMPT, Standin, continuation, standin
from text.assets import load_assets
from text.tokenizer import Tokenizer

COUNT = 24
EARLY = 9
"""Tokens that a stream has when its server dies."""


@dataclass
class Servers:
    """A prefill worker and two decode workers, each beside a stand-in of its own."""

    fleet: Fleet
    standins: dict[str, Standin]
    tokenizer: Tokenizer

    def behave(self, name: str, **how: Any) -> None:
        self._call(name, "/behave", json.dumps(how).encode())

    def seen(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._call(name, "/seen"))
        return found

    def _call(self, name: str, path: str, data: bytes | None = None) -> bytes:
        url = f"http://127.0.0.1:{self.standins[name].port}{path}"
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=10.0) as response:
            return bytes(response.read())

    @contextmanager
    def post(self, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.fleet.port, timeout=30)
        body = {"model": "demo", "temperature": 0, "ignore_eos": True, "prompt": PROMPT, **body}
        headers = {"content-type": "application/json"}
        with closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with connection.getresponse() as response:
                assert response.status == 200, response.read()
                yield response

    def ask(self, **body: Any) -> dict[str, Any]:
        with self.post(body) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

    def text(self, count: int) -> str:
        return self.tokenizer.decode(continuation(PROMPT, count))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder: Path = tmp_path_factory.mktemp("vllm-fleet")
    roles = {"vp": "prefill", "vd-0": "decode", "vd-1": "decode"}
    with ExitStack() as stack:
        standins = {name: stack.enter_context(standin()) for name in roles}
        settings = ["both.served_model_name=idle"]
        fleet = stack.enter_context(Fleet(folder, prefill=0, decode=0, both=1, settings=settings))
        for name, role in roles.items():
            url = f"--url=http://127.0.0.1:{standins[name].port}"
            fleet.add_worker(name, role, "--engine=vllm", url, "--lease-ms=1500")
        assets = load_assets(demo_model_folder())
        yield Servers(fleet, standins, Tokenizer.from_assets(assets))


def test_every_choice_of_a_request_has_both_legs(servers: Servers) -> None:
    answer = servers.ask(max_tokens=5, n=3)
    assert [choice["text"] for choice in answer["choices"]] == [servers.text(5)] * 3
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


def test_one_token_comes_from_the_decode_side(servers: Servers) -> None:
    before = sum(len(servers.seen(name)["seen"]) for name in ("vd-0", "vd-1"))
    [choice] = servers.ask(max_tokens=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (servers.text(1), "length")
    assert sum(len(servers.seen(name)["seen"]) for name in ("vd-0", "vd-1")) == before + 1


def test_a_stop_string_ends_it(servers: Servers) -> None:
    whole = servers.text(COUNT)
    stop = whole[len(whole) // 2 :][:3]
    [choice] = servers.ask(max_tokens=COUNT, stop=[stop])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_echo_with_log_probabilities_has_one_for_every_token(servers: Servers) -> None:
    [choice] = servers.ask(max_tokens=2, echo=True, logprobs=1)["choices"]
    said = choice["logprobs"]["token_logprobs"]
    assert said == [None, *[-2.5] * (len(PROMPT) - 1), -0.25, -0.25]
    assert choice["text"] == servers.tokenizer.decode(PROMPT) + servers.text(2)
    [choice] = servers.ask(max_tokens=0, echo=True, logprobs=1)["choices"]
    assert choice["logprobs"]["token_logprobs"] == said[: len(PROMPT)]


def test_nothing_is_left_once_the_leases_have_run_out(servers: Servers) -> None:
    servers.fleet.until_idle(timeout_s=10.0)


def test_a_stream_whose_decode_side_dies_goes_on_exactly_at_another(servers: Servers) -> None:
    """The last test: it ends a server and its worker."""
    names = ("vd-0", "vd-1")
    for name in names:
        servers.behave(name, hang_after=EARLY)
    with servers.post({"max_tokens": COUNT, "stream": True}) as response:
        lines = iter(response.readline, b"")
        early = text_of(next(line for line in lines if text_of(line)))

        def runs() -> list[str]:
            return [name for name in names if servers.seen(name)["running"]]

        [victim] = servers.fleet.until(runs, what="the stream to run somewhere")
        [other] = set(names) - {victim}
        servers.behave(other)
        servers.standins[victim].process.send_signal(signal.SIGKILL)
        rest = [line for line in lines if line.strip()]
    assert rest[-1].strip() == b"data: [DONE]"
    assert early + "".join(map(text_of, rest)) == servers.text(COUNT)
    [resumed] = [
        entry["body"]
        for entry in servers.seen(other)["seen"]
        if len(entry["body"]["prompt"]) > len(PROMPT)
    ]
    given = resumed["prompt"][len(PROMPT) :]
    assert given == continuation(PROMPT, len(given))
    assert resumed["max_tokens"] == COUNT - len(given)
    assert servers.fleet.until_ended(victim) == 70
    assert servers.ask(max_tokens=3)["choices"][0]["text"] == servers.text(3)


def text_of(line: bytes) -> str:
    """What a line of the stream adds."""
    if not line.startswith(b"data: {"):
        return ""
    return "".join(choice["text"] for choice in json.loads(line[6:])["choices"])

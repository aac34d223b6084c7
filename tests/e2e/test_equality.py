"""Fifty prompts through one worker of both roles and through prefill + decode over each transport:
the same text everywhere, and transformers' where greedy.

Every second prompt is sampled, and every second pair has penalties, a bias and log-probabilities:
what they depend on crosses from one leg to the other.

A greedy decision whose two best logits are closer than `MARGIN` may fall either way when other
sequences share the step (batch shapes move float sums), so prompts are drawn until the reference
has no such tie; how many were passed over is asserted to stay small.
"""

import asyncio
import pydoc_data.topics
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from baton.demo import demo_model_folder
from tests.e2e.fleet import MODEL, Fleet
from text.assets import load_assets
from text.tokenizer import Tokenizer

NUM_PROMPTS = 50
MAX_PROMPT = 2_000
MAX_TOKENS = 20
CONCURRENCY = 8
MARGIN = 1e-4

pytestmark = [pytest.mark.xdist_group("equality"), pytest.mark.timeout(240)]


NOISE = 1e-3
"""Batch shapes move log-probabilities by less."""
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.05,
    "presence_penalty": -1.5,
    "frequency_penalty": 0.7,
    "logit_bias": {"300": 8, "301": -100},
    "logprobs": 2,
}
"""Each of them changes the greedy answers to about half of the prompts."""
TRANSPORTS: dict[str, tuple[str, dict[str, str]]] = {
    "shm": ("shm", {}),
    "tcp": ("tcp", {}),
    "nixl": ("nixl", {}),
    "nixl over tcp": ("nixl", {"UCX_TLS": "tcp"}),
    "ucx": ("ucx", {}),
}
"""What is asked for, and in which environment."""


@dataclass(frozen=True)
class Case:
    ids: list[int]
    options: dict[str, Any]
    expected: str | None
    """Text of transformers, where greedy."""


@dataclass(frozen=True)
class Answer:
    text: str
    logprobs: list[float]
    """Of its tokens, where asked for."""


class Reference:
    """Greedy continuation by transformers, with the smallest gap between the two best logits."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(
        self, ids: list[int], num_tokens: int, options: dict[str, Any]
    ) -> tuple[list[int], float]:
        torch = self._torch
        out: list[int] = []
        smallest = float("inf")
        past: Any = None
        feed = torch.tensor([ids])
        with torch.inference_mode():
            for _ in range(num_tokens):
                answer = self._model(feed, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = answer.past_key_values
                logits = self._penalised(answer.logits[0, -1].clone(), ids, out, options)
                best = logits.topk(2)
                smallest = min(smallest, float(best.values[0] - best.values[1]))
                out.append(int(best.indices[0]))
                feed = torch.tensor([[out[-1]]])
        return out, smallest

    def _penalised(
        self, logits: Any, ids: list[int], out: list[int], options: dict[str, Any]
    ) -> Any:
        """By the formulas of OpenAI's documentation, and for repetition of transformers'."""
        for token, bias in options.get("logit_bias", {}).items():
            logits[int(token)] += bias
        repetition = options.get("repetition_penalty", 1.0)
        seen = self._torch.tensor(sorted({*ids, *out}))
        old = logits[seen]
        logits[seen] = self._torch.where(old < 0, old * repetition, old / repetition)
        for token, count in Counter(out).items():
            logits[token] -= options.get("presence_penalty", 0.0)
            logits[token] -= count * options.get("frequency_penalty", 0.0)
        return logits


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_assets(load_assets(demo_model_folder()))


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    """In one thread: several on a busy machine wait for each other at every small step."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference(demo_model_folder())
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(tokenizer: Tokenizer, reference: Reference) -> list[Case]:
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    corpus = tokenizer.encode(text[:400_000], add_special_tokens=False)
    rng = random.Random(20)
    lengths = [1, 2, 31, 32, 33, 64, 65, MAX_PROMPT]
    lengths += [int(MAX_PROMPT ** rng.random()) for _ in range(NUM_PROMPTS - len(lengths))]
    found: list[Case] = []
    passed_over = 0
    for number, length in enumerate(lengths):
        while True:
            start = rng.randrange(len(corpus) - length)
            ids = corpus[start : start + length]
            options = PENALTIES if number % 4 >= 2 else {}
            if number % 2:
                options = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01} | options
                found.append(Case(ids, {"seed": rng.randrange(1 << 40)} | options, None))
                break
            out, margin = reference.greedy(ids, MAX_TOKENS, options)
            if margin >= MARGIN:
                expected = tokenizer.decode(out, skip_special_tokens=True)
                found.append(Case(ids, {"temperature": 0} | options, expected))
                break
            passed_over += 1
    assert passed_over <= NUM_PROMPTS, "too many near ties for the test to mean anything"
    return found


async def answers(fleet: Fleet, cases: list[Case]) -> list[Answer]:
    """Completions of all cases, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession() as session:

        async def ask(case: Case) -> Answer:
            body = {
                "model": MODEL,
                "prompt": case.ids,
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
                **case.options,
            }
            async with gate, session.post(f"{fleet.base_url}/v1/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                whole = await answer.json()
                assert whole["usage"]["completion_tokens"] == MAX_TOKENS
                choice = whole["choices"][0]
                scored = choice["logprobs"]["token_logprobs"] if "logprobs" in case.options else []
                return Answer(choice["text"], scored)

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(case)) for case in cases]
        return [task.result() for task in asked]


@pytest.fixture(scope="module")
def aggregated(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What one worker of both roles says."""
    folder = tmp_path_factory.mktemp("both")
    with Fleet(folder, prefill=0, decode=0, both=1, engine="torch") as fleet:
        found = asyncio.run(answers(fleet, cases))
        assert fleet.metric("baton_kv_transfers_total") == 0
    return found


def test_one_worker_says_what_transformers_says(
    cases: list[Case], aggregated: list[Answer]
) -> None:
    greedy = [number for number, case in enumerate(cases) if case.expected is not None]
    assert len(greedy) == NUM_PROMPTS // 2
    assert [aggregated[n].text for n in greedy] == [cases[n].expected for n in greedy]


@pytest.mark.parametrize("path", TRANSPORTS)
def test_prefill_and_decode_on_two_workers_say_the_same(
    path: str,
    cases: list[Case],
    aggregated: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, environ = TRANSPORTS[path]
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with Fleet(
        tmp_path,
        engine="torch",
        settings=["router.local_prefill_tokens=0"],
        flags=[f"--transfer={transport}"],
    ) as fleet:
        assert_light(fleet.process("router").pid)
        told = Path(f"/proc/{fleet.process('decode-0').pid}/environ").read_text().split("\0")
        assert {f"{name}={value}" for name, value in environ.items()} <= set(told)
        found = asyncio.run(answers(fleet, cases))
        pulled = fleet.metric("baton_kv_transfers_total", transport=transport)
        assert pulled == fleet.metric("baton_kv_transfers_total") == NUM_PROMPTS
    assert [answer.text for answer in found] == [answer.text for answer in aggregated]
    for answer, alone in zip(found, aggregated, strict=True):
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=NOISE)
    scored = [answer for answer in found if answer.logprobs]
    assert [len(answer.logprobs) for answer in scored] == [MAX_TOKENS] * (NUM_PROMPTS // 2 - 1)


def assert_light(pid: int) -> None:
    """The router of a torch fleet has the tokenizer, but neither torch nor its weight.

    Its own memory is looked at: how much of its libraries' files counts as resident depends on what
    the page cache happens to hold (5 MB more were seen after a copy of the environment)."""
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    own_kb = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon:"))
    assert own_kb <= 50 * 1024

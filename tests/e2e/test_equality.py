"""Fifty prompts through one worker of both roles and through prefill + decode over each transport:
the same text everywhere, and transformers' where greedy.

A greedy decision whose two best logits are closer than `MARGIN` may fall either way when other
sequences share the step (batch shapes move float sums), so prompts are drawn until the reference
has no such tie; how many were passed over is asserted to stay small.
"""

import asyncio
import pydoc_data.topics
import random
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


@dataclass(frozen=True)
class Case:
    ids: list[int]
    seed: int | None
    """None: greedy."""
    expected: str | None
    """Text of transformers, where greedy."""


class Reference:
    """Greedy continuation by transformers, with the smallest gap between the two best logits."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, ids: list[int], num_tokens: int) -> tuple[list[int], float]:
        torch = self._torch
        out: list[int] = []
        smallest = float("inf")
        past: Any = None
        feed = torch.tensor([ids])
        with torch.inference_mode():
            for _ in range(num_tokens):
                answer = self._model(feed, past_key_values=past, use_cache=True)
                past = answer.past_key_values
                best = answer.logits[0, -1].topk(2)
                smallest = min(smallest, float(best.values[0] - best.values[1]))
                out.append(int(best.indices[0]))
                feed = torch.tensor([[out[-1]]])
        return out, smallest


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_assets(load_assets(demo_model_folder()))


@pytest.fixture(scope="module")
def cases(tokenizer: Tokenizer) -> list[Case]:
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    corpus = tokenizer.encode(text[:400_000], add_special_tokens=False)
    rng = random.Random(20)
    reference = Reference(demo_model_folder())
    lengths = [1, 2, 31, 32, 33, 64, 65, MAX_PROMPT]
    lengths += [int(MAX_PROMPT ** rng.random()) for _ in range(NUM_PROMPTS - len(lengths))]
    found: list[Case] = []
    passed_over = 0
    for number, length in enumerate(lengths):
        while True:
            start = rng.randrange(len(corpus) - length)
            ids = corpus[start : start + length]
            if number % 2:
                found.append(Case(ids, rng.randrange(1 << 40), None))
                break
            out, margin = reference.greedy(ids, MAX_TOKENS)
            if margin >= MARGIN:
                expected = tokenizer.decode(out, skip_special_tokens=True)
                found.append(Case(ids, None, expected))
                break
            passed_over += 1
    assert passed_over <= NUM_PROMPTS, "too many near ties for the test to mean anything"
    return found


async def answers(fleet: Fleet, cases: list[Case]) -> list[str]:
    """Streamed completions of all cases, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession() as session:

        async def ask(case: Case) -> str:
            sampling = {"temperature": 0} if case.seed is None else {"seed": case.seed}
            if case.seed is not None:
                sampling |= {"temperature": 0.9, "top_p": 0.95}
            body = {
                "model": MODEL,
                "prompt": case.ids,
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
                **sampling,
            }
            async with gate, session.post(f"{fleet.base_url}/v1/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                whole = await answer.json()
                assert whole["usage"]["completion_tokens"] == MAX_TOKENS
                return str(whole["choices"][0]["text"])

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(case)) for case in cases]
        return [task.result() for task in asked]


@pytest.fixture(scope="module")
def aggregated(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one worker of both roles says."""
    folder = tmp_path_factory.mktemp("both")
    with Fleet(folder, prefill=0, decode=0, both=1, engine="torch") as fleet:
        texts = asyncio.run(answers(fleet, cases))
        assert fleet.metric("baton_kv_transfers_total") == 0
    return texts


def test_one_worker_says_what_transformers_says(cases: list[Case], aggregated: list[str]) -> None:
    greedy = [number for number, case in enumerate(cases) if case.expected is not None]
    assert len(greedy) == NUM_PROMPTS // 2
    assert [aggregated[n] for n in greedy] == [cases[n].expected for n in greedy]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_prefill_and_decode_on_two_workers_say_the_same(
    transport: str, cases: list[Case], aggregated: list[str], tmp_path: Path
) -> None:
    with Fleet(
        tmp_path,
        engine="torch",
        settings=["router.local_prefill_tokens=0"],
        flags=[f"--transfer={transport}"],
    ) as fleet:
        assert_light(fleet.process("router").pid)
        texts = asyncio.run(answers(fleet, cases))
        pulled = fleet.metric("baton_kv_transfers_total", transport=transport)
    assert texts == aggregated
    assert pulled == NUM_PROMPTS


def assert_light(pid: int) -> None:
    """The router of a torch fleet has the tokenizer, but neither torch nor its weight."""
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    resident_kb = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS:"))
    assert resident_kb <= 80 * 1024

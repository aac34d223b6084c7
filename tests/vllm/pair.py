"""Two vLLM servers, a router, a Baton worker beside each, and what transformers would say."""

import http.client
import json
import pydoc_data.topics
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from baton.demo import demo_model_folder
from tests.e2e.fleet import Fleet
from tests.vllm.reference import MARGIN, Case, Reference
from tests.vllm.servers import VllmServer
from text.assets import load_assets
from text.template import ChatTemplate
from text.tokenizer import Tokenizer

NUM_PROMPTS = 50
MAX_TOKENS = 12
CHAT = [{"role": "user", "content": "What does the with statement do in a program?"}]


@dataclass
class Pair:
    """Two servers, a router, and a Baton worker beside each."""

    fleet: Fleet
    prefill: VllmServer
    decode: VllmServer
    tokenizer: Tokenizer
    corpus: list[int]
    cases: list[Case]
    """For the comparison with transformers; the others are for one test each."""
    chat: Case
    short: Case
    forged: Case
    innocent: Case
    frozen: Case
    pulled: Case
    orphan: Case

    def any(self, seed: int, length: int) -> list[int]:
        """Some prompt, whatever follows it."""
        start = random.Random(seed).randrange(len(self.corpus) - length)
        return self.corpus[start : start + length]

    def ask(self, body: dict[str, Any], endpoint: str = "completions") -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.fleet.port, timeout=90)
        try:
            headers = {"content-type": "application/json"}
            body = {"model": "demo", "temperature": 0, "ignore_eos": True, **body}
            connection.request("POST", f"/v1/{endpoint}", json.dumps(body), headers)
            response = connection.getresponse()
            return {"status": response.status, **json.loads(response.read())}
        finally:
            connection.close()

    def num_pulls(self) -> float:
        return self.decode.metric("vllm:nixl_xfer_time_seconds_count")


def prepared() -> dict[str, Any]:
    """All that is computed by transformers, before two servers take the cores."""
    assets = load_assets(demo_model_folder())
    tokenizer = Tokenizer.from_assets(assets)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    corpus = tokenizer.encode(text[:300_000], add_special_tokens=False)
    reference = Reference()
    rng = random.Random(8)
    lengths = [8, 31, 32, 33, 64, 65, 700]
    lengths += [int(8 * 30 ** rng.random()) for _ in range(NUM_PROMPTS - len(lengths))]
    ends = set(tokenizer.eos_ids)
    cases = reference.draw(corpus, [*lengths, 80, 96, 96, 200, 200, 200], MAX_TOKENS)
    chat = ChatTemplate.from_assets(assets).render(
        CHAT, now=datetime.now(UTC), add_generation_prompt=True
    )
    ids = tokenizer.encode(chat, add_special_tokens=False)
    out, margin = reference.greedy(ids, MAX_TOKENS)
    assert margin >= MARGIN, "another question is needed"
    out = out[: next((i for i, token in enumerate(out) if token in ends), len(out))]
    names = ("short", "forged", "innocent", "frozen", "pulled", "orphan")
    return {
        "tokenizer": tokenizer,
        "corpus": corpus,
        "cases": cases[:NUM_PROMPTS],
        "chat": Case(ids, out),
        **dict(zip(names, cases[NUM_PROMPTS:], strict=True)),
    }


@contextmanager
def running_pair(folder: Path) -> Iterator[Pair]:
    """Until both servers, the router and both workers serve, and until all of it is gone."""
    values = prepared()
    servers = [VllmServer("prefill", folder), VllmServer("decode", folder)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.until_ready()
            server.warm_up()
        # two servers that spin share the cores with us: routers are patient here
        settings = ["both.served_model_name=idle", "router.accept_timeout_ms=5000"]
        settings += ["router.silence_timeout_ms=8000", "router.kv_transfer_timeout_ms=15000"]
        with Fleet(folder / "fleet", prefill=0, decode=0, both=1, settings=settings) as fleet:
            for server, name in zip(servers, ("vp", "vd"), strict=True):
                fleet.add_worker(name, server.role, *server.flags)
            yield Pair(fleet, *servers, **values)
    finally:
        for server in servers:
            server.stop()

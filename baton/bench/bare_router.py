"""The floor of a request: a router that decides nothing, on the libraries that Baton's stands on.

    python -m baton.bench.bare_router serve NATS_PORT
    python -m baton.bench.bare_router answer NATS_PORT

`serve` reads a chat request with aiohttp and msgspec, renders it with jinja2, makes tokens of it,
sends both legs' jobs over nats-py, as the router does in one envelope a turn, and answers with what
came back. It validates, schedules, times and remembers nothing, and survives nothing. `answer` is
both workers, which only pretend. What Baton's router takes more than `serve` in the same round is
its own code.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Final

import jinja2
import msgspec
import tokenizers
import uvloop
from aiohttp import web

from baton.bench.fleet import Process, serving
from baton.bench.pretend_workers import PretendWorkers
from baton.demo import demo_model_folder
from protocol.blocks import pack_ids
from protocol.bus import Message
from protocol.codec import decode_jobs, decode_out, encode
from protocol.jobs import Decode, Job, JobEnvelope, Prefill, Tokens
from protocol.mailbox import Mailer
from protocol.nats_bus import NatsBus
from protocol.nats_config import NatsConfig
from protocol.openai import ChatRequest
from protocol.out import Prefilled, StepFrame
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from text.assets import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, load_assets

_ROUTER: Final = "bare"
_SUBJECTS: Final = Subjects("bench-floor")
_PREFILL: Final = _SUBJECTS.jobs("prefill-0", "prefill-1")
_DECODE: Final = _SUBJECTS.jobs("decode-0", "decode-1")


class _Asked:
    """A request on its way: what its decode leg needs of it, and what it waits for."""

    __slots__ = ("done", "prompt", "sampling", "text")

    def __init__(self, prompt: Tokens, sampling: Sampling) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.text = ""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class BareRouter:
    """One process's; `handle` is the HTTP handler, `on_out` hears the workers."""

    def __init__(self, bus: NatsBus) -> None:
        folder = demo_model_folder()
        config = load_assets(folder).json(TOKENIZER_CONFIG_FILE)
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        self._variables = {"bos_token": config["bos_token"], "add_generation_prompt": True}
        self._template = environment.from_string(config["chat_template"])
        self._tokenize = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._bodies = msgspec.json.Decoder(ChatRequest)
        self._numbers = count()
        self._asked: dict[int, _Asked] = {}
        self._mailer: Mailer[Job] = Mailer(bus, envelope=_envelope, on_overflow=_overflow)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = self._bodies.decode(await request.read())
        text = self._template.render(messages=body.messages, **self._variables)
        ids = self._tokenize.encode_batch_fast([text], add_special_tokens=False)[0].ids
        asked = _Asked(Tokens(pack_ids(ids)), Sampling(body.max_tokens or 1))
        attempt = next(self._numbers)
        self._asked[attempt] = asked
        self._mailer.post(_PREFILL, Prefill(attempt, "choice/0", asked.prompt, asked.sampling))
        await asked.done
        if not body.stream:
            return web.Response(body=_whole(asked, len(ids)), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write_eof(b"data: %b\n\ndata: [DONE]\n\n" % _whole(asked, len(ids)))
        return response

    def on_out(self, message: Message) -> None:
        for out in decode_out(message.payload).outs:
            if isinstance(out, Prefilled):
                asked = self._asked[out.attempt]
                asked.text += out.first.text if out.first is not None else ""
                job = Decode(out.attempt, "choice/0", asked.prompt, asked.sampling, out.handle)
                self._mailer.post(_DECODE, job)
            elif isinstance(out, StepFrame):
                for delta in out.deltas:
                    asked = self._asked.pop(delta.attempt)
                    asked.text += delta.text
                    asked.done.set_result(None)


def _envelope(_subject: str, jobs: list[Job]) -> bytes:
    return encode(JobEnvelope(_ROUTER, jobs))


def _overflow(_subject: str, jobs: list[Job]) -> None:
    raise RuntimeError(f"{len(jobs)} jobs found no room")


def _whole(asked: _Asked, num_tokens: int) -> bytes:
    message = {"role": "assistant", "content": asked.text}
    return msgspec.json.encode(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": 2},
        }
    )


async def serve(nats_port: int) -> None:
    """Until killed; prints its port."""
    bus = NatsBus(NatsConfig(urls=(f"nats://127.0.0.1:{nats_port}",)))
    await bus.start()
    router = BareRouter(bus)
    await bus.subscribe(_SUBJECTS.out_all(_ROUTER), router.on_out)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", router.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def answer(nats_port: int) -> None:
    """Until killed; prints the port that it was given, as one that is ready."""
    bus = NatsBus(NatsConfig(urls=(f"nats://127.0.0.1:{nats_port}",)))
    await bus.start()
    workers = PretendWorkers(bus, _SUBJECTS, _ROUTER)

    def on_jobs(message: Message) -> None:
        for said in workers.answers([decode_jobs(message.payload)]):
            bus.publish(said.subject, said.payload)

    await bus.subscribe(_PREFILL, on_jobs)
    await bus.subscribe(_DECODE, on_jobs)
    print(nats_port, flush=True)
    await asyncio.Event().wait()


@asynccontextmanager
async def bare_router(nats_port: int) -> AsyncIterator[tuple[int, Process]]:
    """Both as processes of their own: the router's port, and what the router uses."""
    async with (
        serving("bare_router", "answer", nats_port),
        serving("bare_router", "serve", nats_port) as (port, pid),
    ):
        yield port, Process(pid)


if __name__ == "__main__":
    uvloop.run((serve if sys.argv[1] == "serve" else answer)(int(sys.argv[2])))

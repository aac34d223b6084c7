"""A mock OpenAI server that costs next to nothing: what proxies are measured in front of.

    python -m baton.bench.mock_openai STEP_MS

It prints its port. Words and paths are those that vLLM adds for whoever drives it: a prompt whose
blocks shall be kept is answered with where they are, a stream names the ids of its tokens. A stream
gets its first token at once and one more each `STEP_MS` (0: each turn of the loop), all streams in
one step; a token is an event, a chunk and a write of its own. It reads no prompt, computes nothing,
and anybody may come for blocks that it never had.
"""

import asyncio
import re
import sys
from typing import Any, Final, cast

import msgspec
import uvloop

TOKENS: Final = range(1000, 1010)
"""Ids of an answer: the one before which `left` others come is `TOKENS[left % len(TOKENS)]`, so
that an answer with a token lost, doubled or moved reads otherwise."""
_MAX_CONTEXT: Final = 1 << 17
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_COMPLETION: Final = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1790000000,
    "model": "demo",
}
_CHOICE: Final = {"index": 0, "text": " word", "logprobs": None, "stop_reason": None}
_BLOCKS: Final = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3, 4, 5, 6, 7, 8]],
    "remote_engine_id": "01234567-89ab-cdef-0123-456789abcdef",
    "remote_request_id": _COMPLETION["id"],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}
_STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


class _Asked(msgspec.Struct):
    max_tokens: int = 16
    stream: bool = False


_asked: Final = msgspec.json.Decoder(_Asked)


def _event(payload: bytes) -> bytes:
    return b"%x\r\ndata: %b\n\n\r\n" % (len(payload) + 8, payload)


def _token(token: int, finish: str | None) -> bytes:
    choice = {**_CHOICE, "token_ids": [token], "finish_reason": finish}
    return _event(msgspec.json.encode({**_COMPLETION, "choices": [choice]}))


def _whole(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _json(value: Any) -> bytes:
    return _whole("200 OK", "application/json", msgspec.json.encode(value))


_EVENTS: Final = [_token(token, None) for token in TOKENS]
_LAST: Final = _token(TOKENS[0], "length") + _event(b"[DONE]") + b"0\r\n\r\n"
_PREFILLED: Final = _json(
    {
        **_COMPLETION,
        "choices": [{**_CHOICE, "finish_reason": "length"}],
        "kv_transfer_params": _BLOCKS,
    }
)
_FOUND: Final = {
    b"/v1/models": _json({"data": [{"id": "demo", "max_model_len": _MAX_CONTEXT}]}),
    b"/version": _json({"version": "mock"}),
    b"/health": _json({}),
}


class Steps:
    """What all connections share: the streams, each with its tokens to come."""

    def __init__(self, step_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_s = step_s
        self._due = 0.0
        self._left: dict[asyncio.Transport, int] = {}
        self._num_steps = 0

    def begin(self, transport: asyncio.Transport, num_tokens: int) -> None:
        transport.write(_STREAM_HEAD + _said(num_tokens - 1))
        if num_tokens == 1:
            return
        if not self._left:
            self._due = self._loop.time() + self._step_s
            self._loop.call_at(self._due, self._step)
        self._left[transport] = num_tokens - 1

    def end(self, transport: asyncio.Transport) -> None:
        self._left.pop(transport, None)

    def metrics(self) -> bytes:
        """What of vLLM's a Baton worker looks at."""
        lines = (
            f"vllm:num_requests_running {len(self._left)}",
            f"vllm:iteration_tokens_total_count {self._num_steps}",
            "vllm:nixl_num_kv_expired_reqs_total 0",
            'vllm:cache_config_info{block_size="32",num_gpu_blocks="1000000"} 1',
        )
        return _whole("200 OK", "text/plain", "\n".join(lines).encode())

    def _step(self) -> None:
        self._num_steps += 1
        for transport, left in list(self._left.items()):
            transport.write(_said(left - 1))
            if left > 1:
                self._left[transport] = left - 1
            else:
                del self._left[transport]
        if self._left:
            self._due += self._step_s
            self._loop.call_at(self._due, self._step)


def _said(left: int) -> bytes:
    """The token before `left` others, and the end behind the last one."""
    return _EVENTS[left % len(_EVENTS)] if left else _LAST


class Connection(asyncio.Protocol):
    """One question at a time."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._steps.end(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or (length is not None and len(body) < int(length[1])):
            return
        self._buffer = b""
        path = head.split(b" ", 2)[1]
        if path == b"/v1/completions":
            self._complete(_asked.decode(body))
        elif path == b"/metrics":
            self._transport.write(self._steps.metrics())
        else:
            self._transport.write(_FOUND.get(path) or _whole("404 Not Found", "text/plain", b""))

    def _complete(self, asked: _Asked) -> None:
        if asked.stream:
            self._steps.begin(self._transport, asked.max_tokens)
        else:
            self._transport.write(_PREFILLED)


async def serve(step_s: float) -> None:
    """Until killed."""
    steps = Steps(step_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(steps), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]) / 1e3))

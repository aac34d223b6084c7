"""A process that speaks vLLM 0.32's JSON and ZeroMQ frames, as they were seen, over real sockets.

It computes nothing: the next token is a function of the ids before it, so that a resumed prompt
goes on where it was. It proves that our side says and reads these shapes and lives through its
faults; it proves nothing about vLLM itself, its blocks or its transfers (`tests/vllm` does).

    python standin.py PORT MODEL_FOLDER PUB_PORT REPLAY_PORT

`POST /behave` sets what the next requests meet, `GET /seen` tells the bodies that came.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

BLOCK = 32
VOCAB = 3000


def next_token(ids: list[int]) -> int:
    """Never a special one of the demo model."""
    return 100 + (sum(ids[-7:]) * 31 + len(ids) * 17) % (VOCAB - 200)


class Standin:
    def __init__(self, root: str) -> None:
        self.root = root
        self.seen: list[dict[str, Any]] = []
        self.running = 0
        self.iterations = 0
        self.started_at = time.time()
        self.behave: dict[str, Any] = {}
        self.events: list[tuple[int, bytes]] = []

    async def models(self, request: web.Request) -> web.Response:
        if status := self.behave.get("models_status"):
            return web.Response(status=status, text="no")
        if key := self.behave.get("key"):
            assert request.headers["Authorization"] == f"Bearer {key}"
        root = self.behave.get("root", self.root)
        model = {"id": "demo", "object": "model", "root": root, "parent": None}
        return web.json_response({"object": "list", "data": [{**model, "max_model_len": 512}]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def metrics(self, _: web.Request) -> web.Response:
        if self.behave.get("metrics") == "other":
            return web.Response(text="# HELP up Of somebody else\nup 1.0\n")
        labels = '{engine="0",model_name="demo"}'
        self.iterations += self.behave.get("tick", 0)
        running = 0 if self.behave.get("frozen") else self.running
        cache = 'block_size="32",cache_dtype="auto",num_gpu_blocks="1000",num_cpu_blocks="None"'
        return web.Response(
            text=f"# HELP vllm:num_requests_running Number\n"
            f"vllm:num_requests_running{labels} {float(running)}\n"
            f"vllm:num_requests_waiting{labels} 0.0\n"
            f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} 7.0\n'
            f"vllm:kv_cache_usage_perc{labels} 0.25\n"
            f"vllm:iteration_tokens_total_count{labels} {float(self.iterations)}\n"
            f"vllm:nixl_num_kv_expired_reqs_total{labels} 0.0\n"
            f"process_start_time_seconds {self.started_at!r}\n"
            f"vllm:cache_config_info{{{cache}}} 1.0\n"
        )

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        seen = {"body": body, "request_id": request.headers.get("X-Request-Id")}
        self.seen.append({**seen, "peer": request.transport.get_extra_info("peername")[1]})
        if status := self.behave.get("status"):
            error = {"message": self.behave.get("message", "no"), "type": "x", "code": status}
            return web.json_response(
                {"error": {**error, "param": self.behave.get("param")}}, status=status
            )
        self.running += 1
        try:
            if not body.get("stream"):
                return await self._whole(body)
            return await self._stream(request, body)
        finally:
            self.running -= 1

    async def _whole(self, body: dict[str, Any]) -> web.Response:
        if self.behave.get("hang_whole"):
            await asyncio.Event().wait()  # until the client goes, or for ever
        self.iterations += 1
        ids = body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if "prompt_logprobs" in body:
            entries = [None] + [
                {
                    str(token): {"logprob": -2.5, "rank": 9, "decoded_token": "?"},
                    "7": {"logprob": -0.5, "rank": 1, "decoded_token": "7"},
                }
                for token in ids[1:]
            ]
            choice["prompt_logprobs"] = entries
        answer: dict[str, Any] = {"id": "cmpl-1", "choices": [choice], "kv_transfer_params": None}
        if body.get("kv_transfer_params", {}).get("do_remote_decode") and not self.behave.get(
            "no_connector"
        ):
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[1, 2, 3]],
                "remote_engine_id": "engine",
                "remote_request_id": "cmpl-x",
                "remote_host": "127.0.0.1",
                "remote_port": 5601,
                "tp_size": 1,
                "remote_num_tokens": len(ids),
                "remote_blocks_expiry_time": None,
                "remote_prefill_cached_tokens": 32,
            }
        return web.json_response(answer)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if error := self.behave.get("stream_error"):
            data = json.dumps({"error": {"message": error, "param": None, "code": 500}})
            await response.write(f"data: {data}\n\ndata: [DONE]\n\n".encode())
            return response
        if self.behave.get("hang_before"):
            await asyncio.Event().wait()
        ids = list(body["prompt"])
        left, per_chunk = body["max_tokens"], self.behave.get("per_chunk", 1)
        while left:
            new = []
            for _ in range(min(left, per_chunk)):
                new.append(next_token(ids))
                ids.append(new[-1])
            left -= len(new)
            self.iterations += 1
            choice: dict[str, Any] = {
                "index": 0,
                "text": "?",
                "logprobs": None,
                "finish_reason": None if left else "length",
                "stop_reason": None,
                "prompt_token_ids": body["prompt"] if len(ids) == len(body["prompt"]) + 1 else None,
                "token_ids": None if self.behave.get("no_ids") else new,
            }
            if "logprobs" in body:
                names = [f"token_id:{token}" for token in new]
                choice["logprobs"] = {
                    "text_offset": [0] * len(new),
                    "token_logprobs": [-0.25] * len(new),
                    "tokens": names,
                    "top_logprobs": [{name: -0.25, "token_id:3": -1.5} for name in names],
                }
            if self.behave.get("stop_after") == len(ids) - len(body["prompt"]):
                left, choice["finish_reason"] = 0, "stop"
            data = json.dumps({"id": "cmpl-1", "choices": [choice]})
            if not left and self.behave.get("late_error"):
                data += '\n\ndata: {"error": {"message": "late"}}'
            await response.write(f"data: {data}\n\n".encode())
            if self.behave.get("hang_after") == len(ids) - len(body["prompt"]):
                await asyncio.Event().wait()  # until the client goes, or for ever
            if self.behave.get("break_after") == len(ids) - len(body["prompt"]):
                assert request.transport is not None
                request.transport.abort()
                return response
        await asyncio.sleep(self.behave.get("pause_before_done", 0.0))
        await response.write(b"data: [DONE]\n\n")
        return response

    # --- for tests ---

    async def get_seen(self, _: web.Request) -> web.Response:
        return web.json_response({"seen": self.seen, "running": self.running})

    async def set_behave(self, request: web.Request) -> web.Response:
        self.behave = await request.json()
        if self.behave.get("forget"):
            self.seen.clear()
            self.events.clear()
        self.started_at = self.behave.get("started_at", self.started_at)
        return web.Response()


async def serve_events(standin: Standin, app: web.Application, pub: int, replay: int) -> None:
    context = zmq.asyncio.Context()
    publisher, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
    publisher.bind(f"tcp://127.0.0.1:{pub}")
    router.bind(f"tcp://127.0.0.1:{replay}")

    async def publish(request: web.Request) -> web.Response:
        said = await request.json()
        payload = msgspec.msgpack.encode([time.time(), said["events"], 0])
        if said.get("kept", True):
            standin.events.append((said["seq"], payload))
        if said.get("sent", True):
            frames = [b"", said["seq"].to_bytes(8, "big"), payload]
            await publisher.send_multipart(frames)
        return web.Response()

    app.router.add_post("/publish", publish)

    async def replays() -> None:
        while True:
            who, _, start = await router.recv_multipart()
            for seq, payload in standin.events:
                if seq >= int.from_bytes(start, "big"):
                    await router.send_multipart([who, b"", b"", seq.to_bytes(8, "big"), payload])
            await router.send_multipart([who, b"", b"", b"\xff" * 8, b""])

    app["replays"] = asyncio.create_task(replays())


async def main(port: int, root: str, pub: int, replay: int) -> None:
    standin = Standin(root)
    app = web.Application(client_max_size=1 << 28)
    app.router.add_get("/v1/models", standin.models)
    app.router.add_get("/version", standin.version)
    app.router.add_get("/metrics", standin.metrics)
    app.router.add_post("/v1/completions", standin.completions)
    app.router.add_get("/seen", standin.get_seen)
    app.router.add_post("/behave", standin.set_behave)
    await serve_events(standin, app, pub, replay)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", os.getpid(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

"""The OpenAI-compatible HTTP endpoint.

Thin: a handler reads the body, lets `Front` check it, submits the choices and lets a sink and a
writer do the rest. Every error has OpenAI's shape and the request id.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from protocol.errors import ClientError
from protocol.ids import is_name
from router.admin import Admin
from router.answers import to_json
from router.catalog import Catalog
from router.connections import Connections
from router.dispatch import Dispatch
from router.family import OWN, is_local
from router.metrics import RouterMetrics
from router.nats_api import model_entry, models_body
from router.requests import Front, Prepared
from router.running import Running
from router.sinks import collect_sink, stream_sink
from router.streams import SseWriter

_log = logging.getLogger("baton.router")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Prepare = Callable[[bytes, str], Awaitable[Prepared]]

_ID_BYTES: Final = 12
_IDS_AT_ONCE: Final = 64
HTTP_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
"""Of refusals that are aiohttp's own."""
_OPEN: Final = frozenset({"/health", "/live", "/ready", "/metrics", "/version"})
"""Paths that need no API key: probes and scrapers."""


class RequestIds:
    """Fresh ids that nobody can guess. Random bytes are a system call, so one serves for many."""

    def __init__(self, random_hex: Callable[[int], str] = secrets.token_hex) -> None:
        self._random_hex = random_hex
        self._ids: list[str] = []

    def __call__(self) -> str:
        if not self._ids:
            pool = self._random_hex(_ID_BYTES * _IDS_AT_ONCE)
            size = 2 * _ID_BYTES
            self._ids = [pool[i : i + size] for i in range(0, len(pool), size)]
        return self._ids.pop()


new_request_id: Final = RequestIds()


class HttpApi:
    """Builds the aiohttp application of one router process."""

    def __init__(
        self,
        *,
        front: Front,
        dispatch: Dispatch,
        running: Running,
        catalog: Catalog,
        admin: Admin,
        metrics: RouterMetrics,
        api_keys: tuple[str, ...],
        max_body_bytes: int,
        client_stall_s: float,
        ping_s: float,
    ) -> None:
        self._front = front
        self._dispatch = dispatch
        self._running = running
        self._catalog = catalog
        self._admin = admin
        self._metrics = metrics
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._client_stall_s = client_stall_s
        self._ping_s = ping_s
        self.connections: Connections[web.RequestHandler] = Connections()
        self.accepting = True
        """False when draining has gone on for a while: new work is refused with a 503."""
        self.closes_connections = False
        """While draining, every answer is the last one on its connection."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._edge])
        app.on_response_prepare.append(self._on_prepare)
        expect = self._expect
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat, expect_handler=expect),
                web.post("/v1/completions", self._completions, expect_handler=expect),
                web.get("/v1/models", self._models, expect_handler=expect),
                web.get("/v1/models/{model:.+}", self._model, expect_handler=expect),
                *self._admin.routes(expect),
            ]
        )
        return app

    # --- the edge ---

    @web.middleware
    async def _edge(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Which connections are busy, and everything that is the same for all requests."""
        self.connections.begin(request.protocol)
        try:
            return await self._answer(request, handler)
        finally:
            self.connections.end(request.protocol, asyncio.get_running_loop().time())

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, API key, and errors in OpenAI's shape."""
        request["id"] = _id_of(request)
        told: ClientError | None = None
        try:
            self._authorize(request)
            response = await handler(request)
        except ClientError as error:
            told = error
            response = error_response(error, request["id"])
        except web.HTTPException as error:
            told = _from_http(error)
            response = error_response(told, request["id"])
            response.headers.update(_kept_headers(error))
        except ConnectionError:
            raise  # the client is gone; aiohttp closes what is left
        except Exception:  # noqa: BLE001 - the edge: a bug becomes a 500 with its request id
            _log.exception("request failed request_id=%s path=%s", request["id"], request.path)
            told = ClientError(500, "internal error", code="internal_error")
            response = error_response(told, request["id"])
        if not response.prepared:
            response.headers["x-request-id"] = request["id"]
        if OWN in request.headers and is_local(request.transport):
            return response  # another router's question is no client's
        door = f"{request.method} {request.path}"
        begun = "begun" in request
        self._dispatch.stories.answered(request["id"], door, response.status, told, has_begun=begun)
        route = request.match_info.route.resource
        path = route.canonical if route is not None else "other"
        self._metrics.answered(path, response.status)
        return response

    async def _on_prepare(self, _request: web.Request, response: web.StreamResponse) -> None:
        """The client asks on another connection next time, and no request of it crosses our
        closing of this one."""
        if self.closes_connections:
            response.force_close()
            response.headers["Connection"] = "close"

    def _authorize(self, request: web.Request) -> None:
        if not self._api_keys or request.path in _OPEN:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode(errors="replace")
        matches = [hmac.compare_digest(given, known) for known in self._api_keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ClientError(401, "a valid API key is required", code="invalid_api_key")

    # --- inference ---

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._front.chat)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, self._front.completion)

    async def _infer(self, request: web.Request, prepare: Prepare) -> web.StreamResponse:
        if not self.accepting:
            raise ClientError(503, "shutting down", code="shutting_down", retry_after_s=1)
        request_id = request["id"] = self._running.begin(request["id"])
        request["begun"] = True
        try:
            prepared = await prepare(await self._body(request), request_id)
            headers = {"x-request-id": request_id}
            if prepared.stream:
                return await self._stream(request, prepared, headers)
            return await self._collect(request_id, prepared, headers)
        finally:
            self._running.end(request_id)

    async def _stream(
        self, request: web.Request, prepared: Prepared, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        request_id = request["id"]

        def on_stall() -> None:
            self._metrics.slow_clients.inc()
            sink.cancel_all()

        writer = SseWriter(
            request_id, stall_s=self._client_stall_s, ping_s=self._ping_s, on_stall=on_stall
        )
        sink = stream_sink(prepared, self._dispatch.cancel, writer)
        self._running.start(request_id, prepared, sink)
        return await writer.serve(request, headers)

    async def _collect(
        self, request_id: str, prepared: Prepared, headers: Mapping[str, str]
    ) -> web.Response:
        sink = collect_sink(prepared, self._dispatch.cancel)
        self._running.start(request_id, prepared, sink)
        await sink.done.wait()
        return json_response(await sink.rendered(), headers=headers)

    # --- bodies ---

    async def _body(self, request: web.Request) -> bytes:
        """The whole body. Raises ClientError: 413 before the rest of it is read, 408 when nothing
        comes, 400 when its encoding is broken."""
        self._check_size(request.content_length or 0)
        parts: list[bytes] = []
        size = 0
        try:
            if request.content.is_eof():  # it came with the head, as most do: nothing to wait for
                body = request.content.read_nowait()
                self._check_size(len(body))
                return body
            while not request.content.at_eof():
                async with asyncio.timeout(self._client_stall_s):
                    part = await request.content.readany()
                parts.append(part)
                size += len(part)
                self._check_size(size)
        except TimeoutError:
            raise ClientError(408, "the body did not arrive", code="body_timeout") from None
        except (ClientError, ConnectionError):
            raise
        except (HttpProcessingError, web.RequestPayloadError) as error:
            message = f"the body's encoding is broken: {type(error).__name__}"
            raise ClientError(400, message, code="invalid_body") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            message = f"the body is larger than {self._max_body_bytes} bytes"
            raise ClientError(413, message, code="body_too_large")

    async def _expect(self, request: web.Request) -> web.StreamResponse | None:
        """`Expect: 100-continue`: what would be refused anyway is refused before it is sent."""
        if request.version < (1, 1):
            return None
        try:
            self._check_size(request.content_length or 0)
            if request.headers["Expect"].lower() != "100-continue":
                raise ClientError(417, "only `Expect: 100-continue` is known", code="expectation")
        except ClientError as error:
            request_id = _id_of(request)
            response = error_response(error, request_id)
            response.headers["x-request-id"] = request_id
            door = f"{request.method} {request.path}"
            self._dispatch.stories.answered(request_id, door, error.status, error, has_begun=False)
            response.force_close()  # the body may come or not
            return response
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
        return None

    # --- models ---

    async def _models(self, _request: web.Request) -> web.Response:
        return json_response(models_body(self._catalog.names()))

    async def _model(self, request: web.Request) -> web.Response:
        wanted = request.match_info["model"]
        for name, created in self._catalog.names():
            if name == wanted:
                return json_response(to_json(model_entry(name, created)))
        message = f"the model `{wanted}` does not exist"
        raise ClientError(404, message, code="model_not_found", param="model")


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _id_of(request: web.Request) -> str:
    """The client's own id if it is a name, else a fresh one."""
    asked = request.headers.get("x-request-id", "")
    return asked if is_name(asked) else new_request_id()


def error_response(error: ClientError, request_id: str) -> web.StreamResponse:
    response = json_response(to_json(error.body(request_id)), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _from_http(error: web.HTTPException) -> ClientError:
    """aiohttp's own refusals (404, 405) in our shape."""
    code = HTTP_CODES.get(error.status, "invalid_request")
    return ClientError(error.status, error.reason, code=code)


def _kept_headers(error: web.HTTPException) -> dict[str, str]:
    allow = error.headers.get("Allow")
    return {"Allow": allow} if allow else {}

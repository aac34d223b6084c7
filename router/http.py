"""The OpenAI-compatible HTTP endpoint.

Thin: a handler reads the body, lets `Front` check it, submits the choices and lets a sink and a
writer do the rest. Every error has OpenAI's shape and the request id.
"""

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web

from protocol.errors import ClientError
from protocol.ids import is_name
from router.admin import Admin
from router.answers import to_json
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.metrics import RouterMetrics
from router.nats_api import model_entry, models_body
from router.requests import Front, Prepared
from router.sinks import CollectSink, StreamSink
from router.streams import ClientStalled, SseWriter

_log = logging.getLogger("baton.router")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Prepare = Callable[[bytes, str], Awaitable[Prepared]]

_OPEN: Final = frozenset({"/health", "/live", "/ready", "/metrics", "/version"})
"""Paths that need no API key: probes and scrapers."""


def new_request_id() -> str:
    return secrets.token_hex(12)


class HttpApi:
    """Builds the aiohttp application of one router process."""

    def __init__(
        self,
        *,
        front: Front,
        dispatch: Dispatch,
        catalog: Catalog,
        admin: Admin,
        metrics: RouterMetrics,
        api_keys: tuple[str, ...],
        max_body_bytes: int,
        client_stall_s: float,
    ) -> None:
        self._front = front
        self._dispatch = dispatch
        self._catalog = catalog
        self._admin = admin
        self._metrics = metrics
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._client_stall_s = client_stall_s
        self.accepting = True
        """False while draining: new work is refused with a 503."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._edge])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                *self._admin.routes(),
            ]
        )
        return app

    # --- the edge ---

    @web.middleware
    async def _edge(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, API key, and errors in OpenAI's shape."""
        asked = request.headers.get("x-request-id", "")
        request_id = asked if is_name(asked) else new_request_id()
        request["id"] = request_id
        try:
            self._authorize(request)
            response = await handler(request)
        except ClientError as error:
            response = error_response(error, request_id)
        except web.HTTPException as error:
            response = error_response(_from_http(error, self._max_body_bytes), request_id)
            response.headers.update(_kept_headers(error))
        except (ClientStalled, ConnectionError):
            self._metrics.slow_clients.inc()
            raise
        except Exception:  # noqa: BLE001 - the edge: a bug becomes a 500 with its request id
            _log.exception("request failed request_id=%s path=%s", request_id, request.path)
            bug = ClientError(500, "internal error", code="internal_error")
            response = error_response(bug, request_id)
        if not response.prepared:
            response.headers["x-request-id"] = request_id
        route = request.match_info.route.resource
        path = route.canonical if route is not None else "other"
        self._metrics.http.labels(path, str(response.status)).inc()
        return response

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
        request_id: str = request["id"]
        prepared = await prepare(await request.read(), request_id)
        headers = {"x-request-id": request_id}
        if prepared.stream:
            return await self._stream(request, prepared, headers)
        return await self._collect(prepared, headers)

    async def _stream(
        self, request: web.Request, prepared: Prepared, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        writer = SseWriter(request["id"], stall_s=self._client_stall_s)
        sink = StreamSink(
            prepared.answer,
            prepared.specs,
            prepared.n,
            self._dispatch.cancel,
            writer,
            include_usage=prepared.include_usage,
        )
        writer.on_stall = sink.cancel_all
        try:
            for spec in prepared.specs:
                self._dispatch.submit(spec, sink)
            return await writer.serve(request, headers)
        finally:
            sink.cancel_all()

    async def _collect(self, prepared: Prepared, headers: Mapping[str, str]) -> web.Response:
        sink = CollectSink(prepared.answer, prepared.specs, prepared.n, self._dispatch.cancel)
        try:
            for spec in prepared.specs:
                self._dispatch.submit(spec, sink)
            body = await sink.done
        finally:
            sink.cancel_all()
        return web.Response(body=body, content_type="application/json", headers=headers)

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


def json_response(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def error_response(error: ClientError, request_id: str) -> web.Response:
    response = json_response(to_json(error.body(request_id)), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _from_http(error: web.HTTPException, max_body_bytes: int) -> ClientError:
    """aiohttp's own refusals (404, 405, 413) in our shape."""
    if error.status == 413:
        message = f"the body is larger than {max_body_bytes} bytes"
        return ClientError(413, message, code="body_too_large")
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status, "invalid_request")
    return ClientError(error.status, error.reason, code=code)


def _kept_headers(error: web.HTTPException) -> dict[str, str]:
    allow = error.headers.get("Allow")
    return {"Allow": allow} if allow else {}

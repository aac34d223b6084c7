"""What operators and probes ask: health, metrics, the fleet as the router sees it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from protocol.codec import as_builtins
from protocol.errors import ClientError
from router.answers import to_json
from router.catalog import Catalog
from router.dispatch import Dispatch
from router.family import OWN, Family, labelled, merged
from router.metrics import RouterMetrics
from router.pairs import joined
from router.scheduling.fleet import WorkerView

MAX_ID: Final = 128
"""Characters of an unknown id that are said back."""


def package_version() -> str:
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "0+unknown"


class Admin:
    """Routes beside the API."""

    def __init__(
        self,
        *,
        dispatch: Dispatch,
        catalog: Catalog,
        metrics: RouterMetrics,
        state: Callable[[], dict[str, Any]],
        is_accepting: Callable[[], bool],
        family: Family | None = None,
    ) -> None:
        """`family`: the routers that share our port, if there are any."""
        self._family = family
        self._dispatch = dispatch
        self._catalog = catalog
        self._metrics = metrics
        self._state = state
        self._is_accepting = is_accepting

    def routes(self, expect: Callable[[web.Request], Awaitable[Any]]) -> list[web.RouteDef]:
        """`expect` answers `Expect` headers."""
        handlers = {
            "/health": self._health,
            "/live": self._live,
            "/ready": self._ready,
            "/version": self._version,
            "/metrics": self._render,
            "/cluster_info": self._cluster_info,
            "/debug/requests/{id:.+}": self._story,
        }
        return [web.get(path, handler, expect_handler=expect) for path, handler in handlers.items()]

    async def _live(self, _request: web.Request) -> web.Response:
        """The process answers."""
        return _json({"status": "live"})

    async def _ready(self, _request: web.Request) -> web.Response:
        """New requests can be served: a decode-capable worker is eligible and we do not drain."""
        ready = self._is_accepting() and any(
            worker.eligible and worker.info.role != "prefill"
            for worker in self._dispatch.scheduler.workers()
        )
        return _json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _health(self, request: web.Request) -> web.Response:
        return await self._ready(request)

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": package_version()})

    async def _cluster_info(self, request: web.Request) -> web.Response:
        workers = [_worker(view) for view in self._dispatch.scheduler.workers()]
        own = {
            "router": self._dispatch.router_id,
            **self._state(),
            "inflight": self._dispatch.num_inflight,
            "queued": self._dispatch.scheduler.num_queued,
        }
        transfers = self._metrics.pairs.for_people()
        others = [msgspec.json.decode(page) for page in await self._others(request)]
        for other in others:
            _add_reservations(workers, other.get("workers", []))
            transfers = joined(transfers, other.get("kv_transfers", []))
        routers = [own, *others]
        family: dict[str, Any] = {}
        if len(routers) > 1:
            family = {
                "inflight": sum(router.get("inflight", 0) for router in routers),
                "queued": sum(router.get("queued", 0) for router in routers),
                "routers": [{name: router.get(name) for name in own} for router in routers],
            }
        return _json({**own, **family, "workers": workers, "kv_transfers": transfers})

    async def _others(self, request: web.Request) -> list[bytes]:
        """What the other routers of our parent answer to the same question, unless one of them
        asks."""
        if self._family is None or OWN in request.headers:
            return []
        return await self._family.ask(request.path_qs, request.headers)

    async def _story(self, request: web.Request) -> web.Response:
        """What happened to a request, leg by leg; also for the last ones that ended. The id may be
        that of the answer, and may name one choice."""
        wanted = request.match_info["id"].removeprefix("chatcmpl-").removeprefix("cmpl-")
        story = self._dispatch.stories.of(wanted)
        if story is None and (found := await self._others(request)):
            return web.Response(body=found[0], content_type="application/json")
        if story is None:
            text = (
                f"this router knows nothing of request `{wanted[:MAX_ID]}`: it has forgotten it, "
            )
            raise ClientError(404, f"{text}or another router served it", code="unknown_request")
        return _json({"router": self._dispatch.router_id, **story})

    async def _render(self, request: web.Request) -> web.Response:
        """Gauges are set on the loop, the text is made in a thread: it takes milliseconds."""
        self._refresh()
        body = await asyncio.to_thread(generate_latest, self._metrics.registry)
        if self._family is not None:
            others = await self._others(request)
            body = await asyncio.to_thread(_of_all, self._dispatch.router_id, body, others)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _refresh(self) -> None:
        scheduler = self._dispatch.scheduler
        metrics = self._metrics
        metrics.queued.set(scheduler.num_queued)
        metrics.notes.of("bad_message", "malformed").value = self._dispatch.num_malformed
        metrics.tasks.set(len(asyncio.all_tasks()))
        counts: dict[tuple[str, str, str], int] = {}
        loads: dict[tuple[str, str, str], float] = {}
        for view in scheduler.workers():
            info = view.info
            for state in ("listed", "live", "eligible"):
                what: tuple[str, str, str] = (info.model, info.role, state)
                counts[what] = counts.get(what, 0) + (1 if getattr(view, state) else 0)
            loads[info.model, info.role, info.worker_id] = view.num_reservations
        metrics.workers.clear()
        metrics.worker_load.clear()
        for what, count in counts.items():
            metrics.workers.labels(*what).set(count)
        for whose, load in loads.items():
            metrics.worker_load.labels(*whose).set(load)


def _of_all(router_id: str, own: bytes, others: Sequence[bytes]) -> bytes:
    pages = [labelled(own.decode(), router_id), *(page.decode() for page in others)]
    return merged(pages).encode()


def _worker(view: WorkerView) -> dict[str, Any]:
    """One worker for people: what it is, what it says, what we hold there."""
    info: dict[str, Any] = as_builtins(view.info)
    report = None
    if view.report is not None:  # an array on the wire; names are for people
        report = {name: getattr(view.report, name) for name in view.report.__struct_fields__}
    return {
        **info,
        "listed": view.listed,
        "live": view.live,
        "eligible": view.eligible,
        "suspected": view.suspected,
        "reservations": view.num_reservations,
        "load": report,
    }


def _add_reservations(workers: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """What another router holds at the workers that we know."""
    held = {_process(worker): worker.get("reservations", 0) for worker in theirs}
    for worker in workers:
        worker["reservations"] += held.get(_process(worker), 0)


def _process(worker: dict[str, Any]) -> tuple[Any, Any]:
    return worker.get("worker_id"), worker.get("incarnation")


def _json(value: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=to_json(value), status=status, content_type="application/json")

"""The models the fleet serves, and their text side: tokenizer and chat template.

Assets come over the bus from any worker of the model, once per digest. A request for a model whose
assets are still on their way waits a little; one for a model nobody ever served is a 404.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from protocol.bus import Bus
from protocol.codec import encode
from protocol.errors import BusError, ClientError
from protocol.jobs import GetAssets, JobEnvelope
from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo
from router.logprobs import TokenNames
from router.sampling_options import Defaults, read_defaults
from text.assets import GENERATION_CONFIG_FILE, AssetsError, decode
from text.template import ChatTemplate
from text.tokenizer import Tokenizer, is_panic

_log = logging.getLogger("baton.router")

FETCH_TIMEOUT_S: Final = 10.0
RETRY_S: Final = 0.5
ASSETS_WAIT_S: Final = 5.0
MAX_MODELS: Final = 256
_TRIAL: Final = "One, two: 3 \u00e9\u4f60 <|x|>"
MAX_TEXTS: Final = 32


@dataclass(frozen=True, slots=True)
class Text:
    """The text side of one assets digest."""

    tokenizer: Tokenizer
    names: TokenNames
    template: ChatTemplate
    defaults: Defaults


class ServedModel(Struct, frozen=True):
    """What the front needs to turn a body into choices."""

    name: str
    tokenizer: Tokenizer
    names: TokenNames
    template: ChatTemplate
    defaults: Defaults
    max_context: int
    model_digest: str


@dataclass(slots=True)
class _Model:
    created: int
    workers: dict[str, WorkerInfo] = field(default_factory=dict)
    is_changed: bool = False
    _best: WorkerInfo | None = None

    def best(self) -> WorkerInfo | None:
        """Whose text and digest new prompts get; looked for again only after a change."""
        if self.is_changed:
            self.is_changed = False
            self._best = _most_common(self.workers.values()) or self._best
        return self._best


class Catalog:
    """Fed by discovery; asked by the front."""

    def __init__(
        self,
        *,
        bus: Bus,
        subjects: Subjects,
        router_id: str,
        tasks: asyncio.TaskGroup,
        wall_clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._router_id = router_id
        self._tasks = tasks
        self._wall_clock = wall_clock
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self._fetching: dict[str, asyncio.Event] = {}
        self.listing_came = False
        """Discovery has told who is there at least once: before, nobody can say 404."""

    # --- discovery's side ---

    def listed(self, info: WorkerInfo) -> None:
        for name, model in self._models.items():
            if name != info.model and model.workers.pop(info.worker_id, None) is not None:
                model.is_changed = True
        model = self._models.setdefault(info.model, _Model(int(self._wall_clock())))
        model.workers[info.worker_id] = info
        model.is_changed = True
        if len(self._models) > MAX_MODELS:
            self._forget_one()
        self._want(info.model, info.assets_digest)

    def _forget_one(self) -> None:
        """The oldest name that nobody serves; else the newest one, which is one too many."""
        idle = (name for name, model in self._models.items() if not model.workers)
        del self._models[next(idle, next(reversed(self._models)))]

    def unlisted(self, worker: str, incarnation: str) -> None:
        for model in self._models.values():
            info = model.workers.get(worker)
            if info is not None and info.incarnation == incarnation:
                del model.workers[worker]
                model.is_changed = True

    # --- the front's side ---

    @property
    def is_fetching(self) -> bool:
        """Somebody's text is on its way."""
        return bool(self._fetching)

    def names(self) -> list[tuple[str, int]]:
        """Served models and when each was first seen (Unix seconds)."""
        return [(name, model.created) for name, model in self._models.items() if model.workers]

    async def served(self, name: str) -> ServedModel:
        """Raises ClientError: 404 for an unknown model, 503 while its assets cannot be had."""
        model = self._models.get(name)
        info = model.best() if model is not None else None
        if not self.listing_came and info is None:
            message = "the list of workers has not arrived from discovery yet"
            raise ClientError(503, message, code="discovery_pending", retry_after_s=1)
        if model is None or info is None:
            message = f"the model `{name}` does not exist"
            raise ClientError(404, message, code="model_not_found", param="model")
        digest = info.assets_digest
        text = self._texts.get(digest)
        if text is None:
            self._want(name, digest)
            await self._wait(digest)
            text = self._texts.get(digest)
        if text is None:
            message = f"the tokenizer of `{name}` has not arrived from its workers yet"
            raise ClientError(503, message, code="assets_unavailable", retry_after_s=1)
        self._texts.move_to_end(digest)
        return ServedModel(
            name=name,
            tokenizer=text.tokenizer,
            names=text.names,
            template=text.template,
            defaults=text.defaults,
            max_context=info.capacity.max_context,
            model_digest=info.model_digest,
        )

    async def _wait(self, digest: str) -> None:
        arrived = self._fetching.get(digest)
        if arrived is None:
            return
        try:
            async with asyncio.timeout(ASSETS_WAIT_S):
                await arrived.wait()
        except TimeoutError:
            pass

    # --- assets ---

    def _want(self, name: str, digest: str) -> None:
        """Start fetching, unless the text is here or on its way."""
        if not digest or digest in self._texts or digest in self._fetching:
            return
        self._fetching[digest] = asyncio.Event()
        self._tasks.create_task(self._fetch(name, digest), name=f"assets {digest[:8]}")

    async def _fetch(self, name: str, digest: str) -> None:
        """Ask workers in turn until one gives the assets; end when nobody has them any more."""
        try:
            while (holders := self._holders(name, digest)) and digest not in self._texts:
                for info in holders:
                    text = await self._ask(info, digest)
                    if text is not None:
                        self._texts[digest] = text
                        if len(self._texts) > MAX_TEXTS:
                            self._texts.popitem(last=False)
                        _log.info("assets loaded model=%s digest=%s", name, digest[:12])
                        break
                else:
                    await asyncio.sleep(RETRY_S)
        finally:
            self._fetching.pop(digest).set()

    def _holders(self, name: str, digest: str) -> list[WorkerInfo]:
        model = self._models.get(name)
        workers = model.workers.values() if model is not None else ()
        return [info for info in workers if info.assets_digest == digest]

    async def _ask(self, info: WorkerInfo, digest: str) -> Text | None:
        ask = encode(JobEnvelope(self._router_id, [GetAssets(digest)]))
        try:
            subject = self._subjects.jobs(info.worker_id, info.incarnation)
            reply = await self._bus.request(subject, ask, timeout_s=FETCH_TIMEOUT_S)
            return await asyncio.to_thread(text_of, reply.payload, digest)
        except (BusError, AssetsError) as error:
            _log.info("no assets from worker=%s: %s", info.worker_id, error)
        except Exception:  # noqa: BLE001 - what a worker sends must not end the router
            _log.exception("bad assets from worker=%s", info.worker_id)
        return None


def _most_common(workers: Collection[WorkerInfo]) -> WorkerInfo | None:
    """A worker of the digest that most workers have: during a rolling upgrade prompts go to the
    larger side. None without workers: then the one before is kept, and the scheduler says 503."""
    counts = Counter(info.model_digest for info in workers)
    if not counts:
        return None
    best = max(counts, key=lambda digest: (counts[digest], digest))
    return next(info for info in workers if info.model_digest == best)


def text_of(payload: bytes, digest: str) -> Text:
    """What a router makes of a worker's answer. Raises AssetsError, whatever it was."""
    assets = decode(payload)
    if assets.digest != digest:
        raise AssetsError("the worker sent other assets than it announced")
    try:
        tokenizer = Tokenizer.from_assets(assets)
        # A tokenizer that is broken shows it at the first text: better here than at a client's.
        tokenizer.decode(tokenizer.encode(_TRIAL, add_special_tokens=True))
        return Text(
            tokenizer,
            TokenNames(tokenizer),
            ChatTemplate.from_assets(assets),
            read_defaults(assets.json(GENERATION_CONFIG_FILE)),
        )
    except AssetsError:
        raise
    except BaseException as error:  # the files may be wrong in any way, a Rust panic is none
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise AssetsError(f"the assets cannot be used: {type(error).__name__} {error}") from None

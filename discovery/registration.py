"""Drives one `LeaseKeeper` against a store: the registration a worker holds.

It must not decide anything: what to do next comes from the keeper. Here is the clock, the waiting,
the logging and the bounded goodbye.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

from discovery.lease_keeper import (
    AskTwin,
    Command,
    Event,
    Failed,
    Grant,
    Granted,
    LeaseEnded,
    LeaseKeeper,
    Look,
    Refuse,
    Renew,
    Renewed,
    Seen,
    TwinAnswered,
    Wait,
    Woken,
    Write,
    Written,
)
from discovery.registry import IsAlive, TwinAlive
from discovery.store import LeaseGone, Store, StoreDenied, StoreUnavailable
from protocol.errors import BusError
from protocol.worker_info import WorkerInfo

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class KeptRegistration:
    """A `Registration` over a store. `first` is done when the key was written or refused."""

    def __init__(
        self,
        store: Store,
        key: str,
        keeper: LeaseKeeper,
        is_alive: IsAlive,
        *,
        ask_limit_s: float,
        patience_s: float,
    ) -> None:
        self._store = store
        self._key = key
        self._keeper = keeper
        self._is_alive = is_alive
        self._ask_limit_s = ask_limit_s
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self.closed = False
        self._was_lost = False
        self._reason = ""
        self._logged_at: dict[str, float] = {}
        """By cause: a call that succeeds in between is no reason to say it again."""

    @property
    def lost(self) -> bool:
        """See `Registration.lost`."""
        return self.closed or self._keeper.lost(self._loop.time())

    async def begin(self, spawn: Spawn) -> None:
        """Start and wait until the key is written. Raises `TwinAlive`; closes itself on any way out
        but success."""
        self._task = spawn(self._run())
        try:
            await self._first
        except BaseException:
            await self.close()
            raise

    async def update(self, info: WorkerInfo) -> None:
        """See `Registration.update`."""
        if self.closed:
            raise RuntimeError("the registration is closed")
        self._keeper.change(info)
        self._settled.clear()
        self._wake.set()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._settled.wait()
        except TimeoutError:
            logger.warning("registry is away: update of %s follows", self._key)

    async def close(self) -> None:
        """See `Registration.close`."""
        if self.closed:
            return
        self.closed = True
        self._settled.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._first.done() and not self._first.cancelled():
            self._first.exception()  # seen by whoever registered
        await self._give_back()

    async def _give_back(self) -> None:
        if self._keeper.lease_id == 0:
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await self._revoke()
        except (TimeoutError, StoreUnavailable, StoreDenied) as error:
            logger.warning("%s was not deleted and will expire: %s", self._key, error)

    async def _revoke(self) -> None:
        # Ending the lease deletes the key only while it is ours: a successor's has another lease.
        try:
            await self._store.revoke(self._keeper.lease_id)
        except StoreUnavailable:
            await self._store.revoke(self._keeper.lease_id)  # perhaps on another end point

    async def _run(self) -> None:
        try:
            await self._keep()
        except Exception as error:
            logger.exception("registration %s ended by a defect", self._key)
            if not self._first.done():
                self._first.set_exception(error)

    async def _keep(self) -> None:
        command = self._keeper.start(self._loop.time())
        while not isinstance(command, Refuse):
            event = await self._perform_safely(command)
            if self.closed:
                return  # an error that came with the cancellation has swallowed it
            command = self._keeper.handle(event, self._loop.time())
            self._tell()
        if not self._first.done():
            self._first.set_exception(TwinAlive(command.info))

    def _tell(self) -> None:
        if self._keeper.settled:
            self._settled.set()
            if not self._first.done():
                self._first.set_result(None)
        lost = self._keeper.lost(self._loop.time())
        if self._first.done() and lost != self._was_lost:
            self._was_lost = lost
            if lost:
                logger.warning("registration %s is lost: %s", self._key, self._reason or "expired")
            else:
                logger.warning("registration %s is back", self._key)

    async def _perform_safely(self, command: Command) -> Event:
        try:
            event = await self._perform(command)
        except LeaseGone:
            self._reason = "its lease has ended"
            return LeaseEnded()
        except StoreDenied as error:
            self._complain(f"registry refused: {error}")
            return Failed(denied=True)
        except (StoreUnavailable, TimeoutError) as error:
            self._complain(f"registry unavailable: {error}")
            return Failed()
        except BusError as error:
            self._complain(f"who has the name cannot be asked: {error}")
            return Failed()
        except Exception as error:
            logger.exception("registration %s: unexpected error", self._key)
            self._reason = repr(error)
            return Failed()
        if not isinstance(command, Wait):
            self._reason = ""
        return event

    def _complain(self, reason: str) -> None:
        now = self._loop.time()
        cause = reason.split(":")[0]
        if now - self._logged_at.get(cause, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged_at[cause] = now
            level = logging.ERROR if reason.startswith("registry refused") else logging.WARNING
            logger.log(level, "registration %s: %s", self._key, reason)
        self._reason = reason

    async def _perform(self, command: Command) -> Event:
        match command:
            case Wait(until):
                return await self._wait(until)
            case Grant(ttl_s):
                lease = await self._store.grant(ttl_s)
                return Granted(lease.lease_id, lease.ttl_s)
            case Renew(lease_id):
                return Renewed(await self._store.keep_alive(lease_id))
            case Write():
                return await self._write(command)
            case Look():
                entry = await self._store.get(self._key)
                if entry is None:
                    return Seen(None)
                return Seen(entry.value, entry.mod_revision, entry.lease_id)
            case AskTwin(info):
                async with asyncio.timeout(self._ask_limit_s):
                    return TwinAnswered(await self._is_alive(info))
            case Refuse():
                raise AssertionError("a refusal is the end")
            case _:
                assert_never(command)

    async def _write(self, command: Write) -> Event:
        result = await self._store.put_if(
            self._key, command.value, lease_id=command.lease_id, mod_revision=command.mod_revision
        )
        if result.stored:
            return Written(result.revision)
        entry = result.current
        if entry is None:
            return Seen(None)
        return Seen(entry.value, entry.mod_revision, entry.lease_id)

    async def _wait(self, until: float) -> Event:
        try:
            async with asyncio.timeout_at(until):
                await self._wake.wait()
                self._wake.clear()
        except TimeoutError:
            pass
        return Woken()

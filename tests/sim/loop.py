"""An event loop whose time is virtual, and the processes that live on it.

When nothing is ready the clock jumps to the next timer, so a minute of a fleet costs only what its
callbacks cost, and the same seed runs the same callbacks in the same order. There are no sockets
and no threads. It knows nothing of Baton.

A process is a label in the context of its callbacks: whatever they start inherits it. So a process
can be frozen (its callbacks wait, as under SIGSTOP) and killed (they never run again, not even
their `finally` blocks have an effect) without its code taking part.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from itertools import count
from typing import Any

MAX_CALLBACKS_AT_ONCE = 200_000
"""More without a tick of the clock: somebody spins."""

_process: ContextVar["Process | None"] = ContextVar("sim_process", default=None)


class Stuck(AssertionError):
    """Nothing is ready and no timer is armed, or time does not pass."""


class SimLoop(asyncio.BaseEventLoop):
    """Run it with `run_until_complete`."""

    def __init__(self) -> None:
        super().__init__()
        self.set_debug(False)
        self.num_run = 0
        """Callbacks so far."""
        self.failures: list[str] = []
        """What nobody caught."""
        self.ending = False
        """The run is over: whatever is left may only unwind."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._processes: list[Process] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = count()
        self._now = 1000.0
        self._at_once = 0
        self.set_exception_handler(self._note)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Of timers that are due together the one armed first comes first."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """At once, and without a thread."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  whatever it is belongs to the caller
            future.set_exception(error)
        return future

    def unwind(self) -> None:
        """End every task, also those of the dead and the frozen, so that nothing is left open."""
        self.ending = True
        for process in self._processes:
            process.thaw()
        for _ in range(50):
            left = [task for task in self._tasks if not task.done()]
            for task in left:
                task.cancel()
            if not left:
                return
            self.run_until_complete(asyncio.sleep(30.0))
        raise Stuck(f"tasks that cannot be cancelled: {left}")

    def add(self, process: "Process") -> None:
        self._processes.append(process)

    def _make_task(self, _loop: Any, work: Any, **options: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=self, **options)
        if not self.ending:
            self._tasks.append(task)
        return task

    def _run_once(self) -> None:
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing will ever happen again")
            if timers[0][0] > self._now:
                self._now = timers[0][0]
                self._at_once = 0
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        self._at_once += len(ready)
        if self._at_once > MAX_CALLBACKS_AT_ONCE:
            raise Stuck(f"time stands still at {self._now}: {list(ready)[:5]}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            process = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is None or process.takes(handle):
                self.num_run += 1
                handle._run()

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def _note(self, _loop: Any, context: dict[str, Any]) -> None:
        if self.ending:
            return
        error = context.get("exception")
        self.failures.append(f"{context['message']}: {error!r}")


class Process:
    """What is frozen and killed together."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.frozen = False
        self.context: Context = copy_context()
        self.context.run(_process.set, self)
        self._parked: deque[asyncio.Handle] = deque()
        loop.add(self)

    def takes(self, handle: asyncio.Handle) -> bool:
        """Whether a callback of ours may run now."""
        if (self.alive and not self.frozen) or self.loop.ending:
            return True
        self._parked.append(handle)
        return False

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        """What waited comes first, in order."""
        self.frozen = False
        self.loop._ready.extend(self._parked)  # type: ignore[attr-defined]
        self._parked.clear()

    def kill(self) -> None:
        self.alive = False

    def call(self, callback: Callable[..., object], *args: object, after_s: float = 0.0) -> None:
        """Run `callback` as one of ours."""
        if after_s > 0.0:
            self.loop.call_later(after_s, callback, *args, context=self.context)
        else:
            self.loop.call_soon(callback, *args, context=self.context)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> "asyncio.Task[Any]":
        return self.loop.create_task(work, name=f"{self.name}: {name}", context=self.context)


def current() -> Process | None:
    """The process whose callback runs."""
    return _process.get()

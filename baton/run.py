"""Runs one process's coroutine: uvloop, signals, exit codes.

The first SIGTERM or SIGINT asks to drain and leave, the second to leave now.
"""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from protocol.errors import ConfigError

_log = logging.getLogger("baton")

Body = Callable[[asyncio.Event, asyncio.Event], Awaitable[int | None]]

EXIT_CONFIG = 2

_GC_THRESHOLDS = (2000, 5, 20)
"""Some requests allocate hundreds of objects each and free them again; Python's 700 would have the
young ones looked through at each burst."""


def run_process(body: Body) -> int:
    """Returns the exit code; a ConfigError is one line on standard error and code 2."""
    _calm_collector()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_main(body))
    except KeyboardInterrupt:
        return 130
    except (ConfigError, BaseExceptionGroup) as error:
        cause = _first(error)
        if not isinstance(cause, ConfigError):
            raise
        return complain(cause)


def _calm_collector() -> None:
    """What is imported stays for good: to look through it takes a tenth of a second, in which
    no token moves, and finds nothing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.enable()


def complain(error: BaseException) -> int:
    print(f"baton: {error}", file=sys.stderr)
    return EXIT_CONFIG


def _first(error: BaseException) -> BaseException:
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


async def _main(body: Body) -> int:
    stop, stop_now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            _log.info("second signal: leaving now")
            stop_now.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await body(stop, stop_now) or 0

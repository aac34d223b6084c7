"""One `baton` process and what it says on standard error."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PATIENCE_S = 20.0


class Process:
    """Made by `baton`."""

    def __init__(self, started: asyncio.subprocess.Process) -> None:
        self.started = started
        self.lines: list[str] = []
        self._changed = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.started.stderr is not None
        async for line in self.started.stderr:
            self.lines.append(line.decode().rstrip())
            self._changed.set()

    async def says(self, text: str) -> str:
        """The first line with `text`, when it is there."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    for line in self.lines:
                        if text in line:
                            return line
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"never said {text!r}: {self.lines}") from None

    def terminate(self) -> None:
        self.started.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.started.kill()

    async def exit(self, *, within_s: float = PATIENCE_S) -> int:
        """Its exit code; by then everything it said is in `lines`."""
        try:
            async with asyncio.timeout(within_s):
                code = await self.started.wait()
        except TimeoutError:
            raise AssertionError(f"did not end within {within_s} s: {self.lines}") from None
        await self._reader
        return code

    async def end(self) -> None:
        if self.started.returncode is None:
            self.started.kill()
        await self.exit()


@asynccontextmanager
async def baton(*arguments: str) -> AsyncIterator[Process]:
    """`baton ARGUMENTS`, killed at the end if it still runs."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "baton",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    process = Process(started)
    try:
        yield process
    finally:
        await process.end()

"""The routers of one parent, as whoever asks for metrics or a story must see them: as one.

They share a port, so a question reaches any of them. Each also listens on a Unix socket in a folder
of their parent's, and the one that was asked asks the others there. Nothing else passes that way.
"""

import asyncio
import contextlib
import os
import socket as socket_module
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import aiohttp

OWN: Final = "Baton-Own"
"""Header of a question between routers: answer for yourself alone."""
_ASK_S: Final = 2.0


class Family:
    """`folder` holds a socket of each router, named after its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / f"{os.getpid()}.sock"
        """Ours."""

    async def ask(self, path: str, headers: Mapping[str, str]) -> list[bytes]:
        """What the others answer with a 200, those that answer in time; `path` with its query."""
        others = [other for other in sorted(self._folder.glob("*.sock")) if other != self.socket]
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(_ask(other, path, headers)) for other in others]
        return [answer for task in asked if (answer := task.result())]

    def leave(self) -> None:
        """We answer no more."""
        _forget(self.socket)


async def _ask(socket: Path, path: str, headers: Mapping[str, str]) -> bytes:
    """Empty if there is no good answer."""
    passed = {name: headers[name] for name in ("Authorization",) if name in headers}
    try:
        async with (
            asyncio.timeout(_ASK_S),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
            session.get(f"http://router{path}", headers={**passed, OWN: "1"}) as answer,
        ):
            if answer.status != 200:
                return b""
            return await answer.read()
    except aiohttp.ClientConnectorError:
        if not _lives(int(socket.stem)):  # it was killed
            _forget(socket)
        return b""
    except (aiohttp.ClientError, TimeoutError):
        return b""


def is_local(transport: asyncio.BaseTransport | None) -> bool:
    """Whether this connection is one between routers."""
    connection = transport.get_extra_info("socket") if transport is not None else None
    return connection is not None and connection.family == socket_module.AF_UNIX


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # gone, or its number is another user's by now
        return False
    return True


def _forget(socket: Path) -> None:
    with contextlib.suppress(OSError):
        socket.unlink()


def labelled(page: str, router: str) -> str:
    """A page of metrics whose every sample says which router's it is. Sums would fall, and look
    like restarts, when one of them is replaced."""
    label = f'router="{router}"'
    lines = [line if line.startswith("#") else _labelled(line, label) for line in page.splitlines()]
    return "\n".join([*lines, ""])


def _labelled(sample: str, label: str) -> str:
    """`name{a="b"} 1` or `name 1` with one label more."""
    at = next((i for i, char in enumerate(sample) if char in "{ "), len(sample))
    if sample[at : at + 1] == "{":
        comma = "" if sample[at + 1 : at + 2] == "}" else ","
        return f"{sample[:at]}{{{label}{comma}{sample[at + 1 :]}"
    return f"{sample[:at]}{{{label}}}{sample[at:]}"


def merged(pages: Iterable[str]) -> str:
    """Several pages as one: each family once, with the samples of all."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for page in pages:
        head: list[str] = []
        samples: list[str] = []
        for line in page.splitlines():
            if line.startswith("# HELP "):
                is_new = line.split(" ", 3)[2] not in families
                known, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
                head = known if is_new else []
            (head if line.startswith("#") else samples).append(line)
    return "\n".join(
        [line for family in families.values() for part in family for line in part] + [""]
    )

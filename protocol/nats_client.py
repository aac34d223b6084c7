"""The nats-py client under `protocol.nats_bus`: no message that somebody sends ends its reading.

Its own parser stops to read, without a word, at a message that it cannot decode, and everybody who
may publish can send one: the server looks at hardly a byte of subjects and headers.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from nats import errors
from nats.aio.client import Client
from nats.protocol import parser

from protocol.delivery import Throttle
from protocol.errors import BusError, BusOverflow, LocalError

_log: Final = logging.getLogger("baton.bus")
_GRUMBLE_S: Final = 60.0
_MAX_REPLY: Final = 1024
"""Bytes. The server closes a connection that sends a line of more than 4096, and an answer's line
holds, beside the reply that somebody chose, what we add."""

# nats-py's own patterns take any white space for a separator. The server does not: a form feed in a
# subject broke the connection, or named another of our subscriptions as the receiver. A reply that
# we could not publish to is none (its group stays empty). The groups are those of the originals.
_SUBJECT_AND_SID: Final = rb"([^ \n]+) ([0-9]+) "
_REPLY: Final = rb"(([^ \r\n]{1,%d}) |[^ \n]+ )?" % _MAX_REPLY
parser.MSG_RE = re.compile(rb"\AMSG " + _SUBJECT_AND_SID + _REPLY + rb"([0-9]+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG " + _SUBJECT_AND_SID + _REPLY + rb"([0-9]+) ([0-9]+)\r\n")


class Malformed:
    """Counts the messages that were dropped because they are none; says so once a minute."""

    def __init__(self) -> None:
        self.number = 0
        self._throttle = Throttle(_GRUMBLE_S)

    def drop(self, subject: bytes, error: Exception) -> None:
        self.number += 1
        if self._throttle.due(asyncio.get_running_loop().time()) is not None:
            _log.warning(
                "dropped malformed messages, in all %d; last on %.100r: %.100s",
                self.number,
                subject,
                error,
            )


class HardyParser(parser.Parser):
    """Drops what is no message, and goes on. Costs something per read, and nothing per message."""

    def __init__(self, client: Client, drop: Callable[[bytes, Exception], None]) -> None:
        super().__init__(client)
        self._drop = drop

    async def parse(self, data: bytes = b"") -> None:
        before = len(self.buf) + len(data)
        while True:
            try:
                await super().parse(data)
                return
            except (errors.ProtocolError, OSError):
                raise  # the connection is of no use any more
            except Exception as error:
                if len(self.buf) == before:
                    raise  # It was no message (those are taken out first): it would come again.
                self._drop(self.msg_arg.get("subject", b""), error)
            data, before = b"", len(self.buf)


class HardyClient(Client):
    def __init__(self, drop: Callable[[bytes, Exception], None]) -> None:
        super().__init__()
        self._ps = HardyParser(self, drop)

    @property
    def reconnecting(self) -> asyncio.Task[None] | None:
        """nats-py's private task, running or ended. None: never needed, or not to be found."""
        task: asyncio.Task[None] | None = getattr(self, "_reconnection_task", None)
        return task


def send(
    client: Client, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None
) -> None:
    """nats-py's publish without a task: it suspends only when its buffer is full."""
    publishing: Coroutine[Any, Any, None] = client.publish(
        subject, payload, reply, dict(headers) if headers else None
    )
    try:
        publishing.send(None)
    except StopIteration:
        return
    except errors.OutboundBufferLimitError:
        raise BusOverflow("the outbound buffer is full") from None
    except (errors.BadSubjectError, ValueError) as error:
        raise LocalError(f"cannot publish to {subject!r}: {error}") from None
    except (errors.Error, OSError) as error:
        raise BusError(str(error)) from None
    publishing.close()
    raise BusOverflow("the outbound buffer is full")

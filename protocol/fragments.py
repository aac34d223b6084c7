"""Large payloads in parts that the server accepts, and the parts back into payloads.

Pure: bytes and headers in, bytes and headers out; the clock is an argument. Knows no bus.

Part `i` of `n` carries the header `Baton-Part: <id> <i> <n>`; the first one alone carries the
reply subject and the sender's own headers. Parts of one payload travel on one subject and so arrive
in order: a part that is not the expected next one means that the payload is lost. In a queue group
the server scatters parts over the members, so a payload that needs parts arrives there only while
the group has one member; everywhere else it is counted as lost.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from protocol.bus import Message
from protocol.errors import LocalError

PART_HEADER: Final = "Baton-Part"
_HEADER_FRAME: Final = len("NATS/1.0\r\n") + len("\r\n")
_LINE_FRAME: Final = len(": \r\n")
_MAX_PARTS: Final = 1_000_000
_MAX_ID: Final = 40
_PART_LINE: Final = len(PART_HEADER) + _LINE_FRAME + _MAX_ID + 2 * (1 + len(str(_MAX_PARTS)))
_PART: Final = re.compile(rf"([A-Za-z0-9.]{{1,{_MAX_ID}}}) (\d{{1,7}}) (\d{{1,7}})", re.ASCII)

Headers = Mapping[str, str]


def header_bytes(headers: Headers | None) -> int:
    """What `headers` add to a message's size on the wire."""
    if not headers:
        return 0
    lines = sum(len(k.encode()) + len(v.encode()) + _LINE_FRAME for k, v in headers.items())
    return _HEADER_FRAME + lines


def split(
    payload: bytes, headers: Headers | None, *, max_payload: int, part_id: str
) -> list[tuple[bytes, Headers | None]]:
    """The messages to send for `payload`: itself if the server takes it, parts otherwise.

    `max_payload` counts headers too, as the server does; `part_id` (letters, digits, dots) must be
    unlike that of any other payload on its way. Raises LocalError if `headers` leave no room.
    """
    own = header_bytes(headers)
    if own + len(payload) <= max_payload:
        return [(payload, headers)]
    room = max_payload - (own or _HEADER_FRAME) - _PART_LINE
    if room <= 0 or len(payload) > room * _MAX_PARTS:
        raise LocalError(f"{own} bytes of headers and {len(payload)} of payload cannot be split")
    count = -(-len(payload) // room)
    return [
        (
            payload[index * room : (index + 1) * room],
            {**(headers or {}), PART_HEADER: f"{part_id} {index} {count}"}
            if index == 0
            else {PART_HEADER: f"{part_id} {index} {count}"},
        )
        for index in range(count)
    ]


@dataclass(slots=True)
class _Join:
    """One payload on its way. Without `first` it is known to be lost; the rest is waited out."""

    first: Message | None
    count: int
    heard_at: float
    parts: list[bytes] = field(default_factory=list)
    held_bytes: int = 0


class Joiner:
    """Puts the parts that one subscription receives together again, within bounds."""

    def __init__(self, *, max_bytes: int, max_age_s: float = 30.0, max_joins: int = 1024) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._max_joins = max_joins
        self._joins: OrderedDict[tuple[str, str], _Join] = OrderedDict()
        self.held_bytes = 0
        self.lost = 0
        """Payloads given up, and parts whose header is rubbish, since the start."""

    def __len__(self) -> int:
        return len(self._joins)

    def add(self, message: Message, now: float) -> Message | None:
        """A whole message (one that came in one piece too), or None while parts are missing."""
        if message.headers is None or PART_HEADER not in message.headers:
            return message
        self.expire(now)
        parsed = _parse(message)
        if parsed is None:
            self.lost += 1
            return None
        part_id, index, count = parsed
        key = (message.subject, part_id)
        join = self._expected(key, index, count, message, now)
        if join.first is not None:
            join.parts.append(message.payload)
            join.held_bytes += len(message.payload)
            self.held_bytes += len(message.payload)
        if index == count - 1:
            self._remove(key)
            return _whole(join)
        self._bound()
        return None

    def expire(self, now: float) -> None:
        """Give up what has been silent for `max_age_s`."""
        while self._joins:
            key, join = next(iter(self._joins.items()))
            if now - join.heard_at < self._max_age_s:
                return
            self._give_up(join)
            self._remove(key)

    def _expected(
        self, key: tuple[str, str], index: int, count: int, message: Message, now: float
    ) -> _Join:
        """The join that this part belongs to; a dead one if it is not the part that must come."""
        join = self._joins.get(key)
        if join is None:
            join = self._joins[key] = _Join(message, count, now)
        join.heard_at = now
        self._joins.move_to_end(key)
        if index != len(join.parts) or count != join.count:
            self._give_up(join)
        return join

    def _give_up(self, join: _Join) -> None:
        if join.first is None:
            return
        self.lost += 1
        self.held_bytes -= join.held_bytes
        join.first, join.parts, join.held_bytes = None, [], 0

    def _remove(self, key: tuple[str, str]) -> None:
        self.held_bytes -= self._joins.pop(key).held_bytes

    def _bound(self) -> None:
        while len(self._joins) > self._max_joins or self.held_bytes > self._max_bytes:
            key, join = next(iter(self._joins.items()))
            self._give_up(join)
            if len(self._joins) > self._max_joins:
                self._remove(key)
            else:
                self._joins.move_to_end(key)


def _parse(message: Message) -> tuple[str, int, int] | None:
    text = (message.headers or {}).get(PART_HEADER, "")
    match = _PART.fullmatch(text)
    if match is None or not message.payload:
        return None
    index, count = int(match[2]), int(match[3])
    return (match[1], index, count) if index < count <= _MAX_PARTS else None


def _whole(join: _Join) -> Message | None:
    if join.first is None:
        return None
    headers = {k: v for k, v in (join.first.headers or {}).items() if k != PART_HEADER}
    return msgspec.structs.replace(
        join.first, payload=b"".join(join.parts), headers=headers or None
    )

"""Bytes of the wire: MessagePack of the mailboxes' structs, and nothing else.

Every decoder raises `BadMessage` for whatever is not exactly its mailbox's type.
"""

from typing import Any, Final, TypeVar

import msgspec

from protocol.errors import BadMessage
from protocol.events import Beat, EventEnvelope, KvSnapshot
from protocol.jobs import JobEnvelope, Pong
from protocol.out import OutEnvelope
from protocol.worker_info import WorkerInfo

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()
_jobs: Final = msgspec.msgpack.Decoder(JobEnvelope)
_out: Final = msgspec.msgpack.Decoder(OutEnvelope)
_events: Final = msgspec.msgpack.Decoder(EventEnvelope)
_beat: Final = msgspec.msgpack.Decoder(Beat)
_pong: Final = msgspec.msgpack.Decoder(Pong)
_snapshot: Final = msgspec.msgpack.Decoder(KvSnapshot)
_info: Final = msgspec.json.Decoder(WorkerInfo)

Wire = JobEnvelope | OutEnvelope | EventEnvelope | Beat | Pong | KvSnapshot


def encode(message: Wire) -> bytes:
    """Bytes of one message."""
    return _encoder.encode(message)


def _decode(decoder: "msgspec.msgpack.Decoder[T] | msgspec.json.Decoder[T]", data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from None


def decode_jobs(data: bytes) -> JobEnvelope:
    """What a router says to a worker. Raises BadMessage."""
    return _decode(_jobs, data)


def decode_out(data: bytes) -> OutEnvelope:
    """What a worker says to a router. Raises BadMessage."""
    return _decode(_out, data)


def decode_events(data: bytes) -> EventEnvelope:
    """What a worker says to all routers. Raises BadMessage."""
    return _decode(_events, data)


def decode_beat(data: bytes) -> Beat:
    """What a router says to all workers. Raises BadMessage."""
    return _decode(_beat, data)


def decode_pong(data: bytes) -> Pong:
    """The answer to a `Ping`. Raises BadMessage."""
    return _decode(_pong, data)


def decode_snapshot(data: bytes) -> KvSnapshot:
    """The answer to a `GetKvSnapshot`. Raises BadMessage."""
    return _decode(_snapshot, data)


def encode_info(info: WorkerInfo) -> bytes:
    """The registry's value for a worker: JSON, so that an operator can read it."""
    return msgspec.json.encode(info)


def decode_info(data: bytes) -> WorkerInfo:
    """The registry's value for a worker. Raises BadMessage."""
    return _decode(_info, data)


def as_builtins(value: Any) -> Any:
    """Plain dicts and lists of a struct, for logs and admin pages."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))

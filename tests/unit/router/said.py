"""What a stream's writer was told, for tests of sinks."""

import json
from collections.abc import Callable
from typing import Any

from protocol.errors import ClientError


class Said:
    """A `ChunkWriter` that keeps what it is told."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.ends: list[ClientError | None] = []

    def write(self, chunk: bytes) -> None:
        assert not self.ends
        self.chunks.append(json.loads(chunk))

    def splice(self, before: bytes, after: bytes) -> Callable[[bytes], None]:
        return lambda middle: self.write(before + middle + after)

    def fail(self, error: ClientError) -> None:
        self.ends.append(error)

    def finish(self) -> None:
        self.ends.append(None)

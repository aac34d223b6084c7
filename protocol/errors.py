"""Whose fault it is, in the type; and what a client is told, in one table.

- `BatonError`
  - `LocalError`: our own bug or misuse; crash loudly.
  - `ConfigError`: settings that cannot work; one line at start.
  - `RemoteError`: the other side's; count it, drop it or answer with a 4xx.
    - `BadMessage`: bytes on the bus that are no message of that mailbox.
  - `ClientError`: goes to the client as an OpenAI error object.
  - `BusError`: the bus could not do it now.
    - `NoResponders`, `BusTimeout`, `BusOverflow`
"""

from typing import Any, Literal

Outcome = Literal["completed", "rejected", "expired", "cancelled", "failed"]
"""How a choice ends, exactly once. Rejected = never started; expired = a deadline of ours."""


class BatonError(Exception):
    """Base of every error Baton raises on purpose."""


class LocalError(BatonError):
    """A rule of our own was broken by our own code."""


class RemoteError(BatonError):
    """The peer did something it must not."""


class BadMessage(RemoteError):
    """Bytes that do not decode as a message of their mailbox."""


class ConfigError(BatonError):
    """Wrong configuration; one clear line for the operator, exit code 2."""


class BusError(BatonError):
    """The bus could not do it now."""


class NoResponders(BusError):
    """Nobody listens on that subject."""


class BusTimeout(BusError):
    """No reply in time."""


class BusOverflow(BusError):
    """The outbound buffer is full; nothing was sent."""


class ClientError(BatonError):
    """What the client is told: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self, request_id: str = "") -> dict[str, Any]:
        """OpenAI's shape; the request id is in the message, so that a client's log has it."""
        message = f"{self.message} (request {request_id})" if request_id else self.message
        kind = error_type(self.status)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def error_type(status: int) -> str:
    """OpenAI's `type` for an HTTP status."""
    names = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        422: "invalid_request_error",
        429: "rate_limit_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")

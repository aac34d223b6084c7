"""What a client is told, and whose fault an error is."""

import pytest

from protocol.errors import (
    BadMessage,
    BatonError,
    BusError,
    BusOverflow,
    BusTimeout,
    ClientError,
    ConfigError,
    LocalError,
    NoResponders,
    RemoteError,
    error_type,
)


def test_a_client_error_has_openais_shape() -> None:
    error = ClientError(429, "too much", code="queue_full", param="n", retry_after_s=3)
    assert error.body() == {
        "error": {
            "message": "too much",
            "type": "rate_limit_error",
            "param": "n",
            "code": "queue_full",
        }
    }
    assert error.body("req-1")["error"]["message"] == "too much (request req-1)"
    assert (error.status, error.retry_after_s, str(error)) == (429, 3, "too much")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (418, "invalid_request_error"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "service_unavailable_error"),
        (504, "timeout_error"),
    ],
)
def test_every_status_has_a_type(status: int, kind: str) -> None:
    assert error_type(status) == kind


def test_the_hierarchy() -> None:
    assert issubclass(BadMessage, RemoteError)
    assert all(issubclass(kind, BusError) for kind in (NoResponders, BusTimeout, BusOverflow))
    for kind in (LocalError, RemoteError, ConfigError, BusError, ClientError):
        assert issubclass(kind, BatonError)
        assert not issubclass(kind, LocalError) or kind is LocalError

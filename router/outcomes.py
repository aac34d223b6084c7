"""One table: how a choice that did not complete is told to the client.

The error `code` is chosen where the decision is made (scheduler, front); the HTTP status and
whether trying again later helps follow from it here and nowhere else.
"""

from typing import Final, NamedTuple

from protocol.errors import ClientError
from router.scheduling.commands import EndChoice


class Told(NamedTuple):
    status: int
    retry_after_s: int | None


OUTCOMES: Final[dict[str, Told]] = {
    "model_not_found": Told(404, None),
    "no_decode_worker": Told(503, 1),
    "queue_full": Told(503, 1),
    "queue_timeout": Told(503, 5),
    "decode_wait_timeout": Told(503, 5),
    "context_length_exceeded": Told(400, None),
    "invalid_request": Told(400, None),
    "handle_mismatch": Told(500, None),
    "attempts_exhausted": Told(502, 1),
    "worker_killer": Told(500, None),
    "worker_failed": Told(502, 1),
    "outage_timeout": Told(503, 5),
    "request_timeout": Told(504, None),
    "shutting_down": Told(503, 1),
    "cancelled": Told(499, None),
    "internal_error": Told(500, None),
}


def client_error(end: EndChoice, param: str | None = None) -> ClientError:
    """What the client of this ended choice gets; names the leg. `param`: the field that a worker
    could not obey, if it is known."""
    told = OUTCOMES.get(end.code, Told(500, None))
    message = end.message or end.code.replace("_", " ")
    return ClientError(
        told.status,
        f"{message} [leg: {end.leg}]" if end.leg != "queue" else message,
        code=end.code,
        param=param if end.code == "invalid_request" else None,
        retry_after_s=end.retry_after_s or told.retry_after_s,
    )

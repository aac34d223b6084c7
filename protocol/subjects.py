"""Every subject is built and parsed here, one tree for each trust zone.

| subject | from -> to |
|---|---|
| `baton.<ns>.api.<endpoint>` | client -> any router (queue group) |
| `baton.<ns>.jobs.<worker>.<incarnation>` | router -> worker |
| `baton.<ns>.out.<router>.<worker>` | worker -> router |
| `baton.<ns>.out.<router>.gone.<worker>.<incarnation>` | bus -> router: nobody listens there |
| `baton.<ns>.out.<router>.client.<token>` | bus -> router: that NATS client has gone |
| `baton.<ns>.events.<worker>` | worker -> all routers |
| `baton.<ns>.routers` | router -> all |
"""

from functools import lru_cache
from typing import Final

from protocol.errors import LocalError
from protocol.ids import is_name

_ROOT: Final = "baton"
_GONE: Final = "gone"
_CLIENT: Final = "client"


class Subjects:
    """The subjects of one namespace."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{_ROOT}.{_checked(namespace)}"
        self.routers = f"{self._prefix}.routers"
        self.all_events = f"{self._prefix}.events.*"
        self.all_api = f"{self._prefix}.api.>"

    def api(self, endpoint: str) -> str:
        """`endpoint` is dotted: `chat.completions`, `completions`, `models`."""
        for part in endpoint.split("."):
            _checked(part)
        return f"{self._prefix}.api.{endpoint}"

    def endpoint_of(self, subject: str) -> str:
        """The dotted endpoint of an api subject; empty if it is not one."""
        head = f"{self._prefix}.api."
        return subject[len(head) :] if subject.startswith(head) else ""

    def jobs(self, worker: str, incarnation: str) -> str:
        return f"{self._prefix}.jobs.{_checked(worker)}.{_checked(incarnation)}"

    def out(self, router: str, worker: str) -> str:
        return f"{self._prefix}.out.{_checked(router)}.{_checked(worker)}"

    def out_all(self, router: str) -> str:
        """Everything said to this router, `gone` included."""
        return f"{self._prefix}.out.{_checked(router)}.>"

    def router_of(self, out_subject: str) -> str:
        """The router an `out` subject is for."""
        return out_subject.split(".")[3]

    def gone(self, router: str, worker: str, incarnation: str) -> str:
        head = f"{self._prefix}.out.{_checked(router)}.{_GONE}"
        return f"{head}.{_checked(worker)}.{_checked(incarnation)}"

    def gone_worker(self, subject: str) -> tuple[str, str] | None:
        """Worker and incarnation named in a `gone` subject; None for any other subject."""
        parts = subject.split(".")
        return (parts[5], parts[6]) if len(parts) == 7 and parts[4] == _GONE else None

    def client(self, router: str, token: str) -> str:
        """Reply subject of chunks to a NATS client: tells the router that it stopped listening."""
        return f"{self._prefix}.out.{_checked(router)}.{_CLIENT}.{_checked(token)}"

    def client_of(self, subject: str) -> str:
        """The token of a `client` subject; empty for any other subject."""
        parts = subject.split(".")
        return parts[5] if len(parts) == 6 and parts[4] == _CLIENT else ""

    def events(self, worker: str) -> str:
        return f"{self._prefix}.events.{_checked(worker)}"

    def events_or_none(self, worker: str) -> str | None:
        """As `events`, for a name that came over the wire: None if it is no name."""
        return f"{self._prefix}.events.{worker}" if is_name(worker) else None


@lru_cache(maxsize=4096)
def _checked(name: str) -> str:
    """Every message names the same few workers; what is no name is not remembered."""
    if not is_name(name):
        raise LocalError(f"{name!r} cannot be part of a subject")
    return name

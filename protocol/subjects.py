"""Every subject is built and parsed here, one tree for each trust zone.

| subject | from -> to |
|---|---|
| `baton.<ns>.api.<endpoint>` | client -> any router (queue group) |
| `baton.<ns>.jobs.<worker>.<incarnation>` | router -> worker |
| `baton.<ns>.out.<router>.<worker>` | worker -> router |
| `baton.<ns>.out.<router>.gone.<worker>` | bus -> router: nobody listens on its jobs |
| `baton.<ns>.events.<worker>` | worker -> all routers |
| `baton.<ns>.routers` | router -> all |
"""

from typing import Final

from protocol.errors import LocalError
from protocol.ids import is_name

_ROOT: Final = "baton"
_GONE: Final = "gone"


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

    def gone(self, router: str, worker: str) -> str:
        return f"{self._prefix}.out.{_checked(router)}.{_GONE}.{_checked(worker)}"

    def gone_worker(self, subject: str) -> str | None:
        """The worker named in a `gone` subject; None for any other subject."""
        parts = subject.split(".")
        return parts[5] if len(parts) == 6 and parts[4] == _GONE else None

    def events(self, worker: str) -> str:
        return f"{self._prefix}.events.{_checked(worker)}"


def _checked(name: str) -> str:
    if not is_name(name):
        raise LocalError(f"{name!r} cannot be part of a subject")
    return name

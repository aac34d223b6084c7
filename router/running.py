"""The requests in progress of one router: their ids, unique while they run, and how to end them.

Both fronts begin and end every request here, so that an id that two clients chose does not name two
requests, and so that a router that leaves can tell all its clients.
"""

from collections.abc import Callable

from protocol.errors import ClientError
from protocol.ids import MAX_NAME, is_name
from router.dispatch import Dispatch
from router.requests import Prepared
from router.sinks import JoinedSink

_MARK = 13


class Running:
    """One per router process."""

    def __init__(self, dispatch: Dispatch, new_id: Callable[[], str]) -> None:
        self._dispatch = dispatch
        self.new_id = new_id
        self._sinks: dict[str, JoinedSink | None] = {}
        """None: still in preparation."""
        self.leaving: ClientError | None = None
        """What everybody is told once the router leaves."""

    def __len__(self) -> int:
        return len(self._sinks)

    def begin(self, asked: str) -> str:
        """The request's id: the client's if it is a name, marked if that is already in use."""
        request_id = asked if is_name(asked) else self.new_id()
        while request_id in self._sinks:
            mark = self.new_id()[: _MARK - 1]
            request_id = f"{request_id[: MAX_NAME - _MARK]}-{mark}"
        self._sinks[request_id] = None
        self._dispatch.stories.began(request_id)
        return request_id

    def start(self, request_id: str, prepared: Prepared, sink: JoinedSink) -> None:
        """Submit the choices; when one is refused at once, the others are not even tried."""
        self._sinks[request_id] = sink
        if self.leaving is not None:
            sink.abort(self.leaving)
            return
        for spec in prepared.specs:
            if sink.over:
                return
            self._dispatch.submit(spec, sink)

    def end(self, request_id: str) -> None:
        """The request is over; what still runs of it is cancelled."""
        sink = self._sinks.pop(request_id, None)
        if sink is not None:
            sink.cancel_all()
        self._dispatch.stories.over(request_id)

    def abort_all(self, error: ClientError) -> None:
        """Every client is told `error`: now, or when its request is prepared."""
        self.leaving = error
        for sink in list(self._sinks.values()):
            if sink is not None:
                sink.abort(error)

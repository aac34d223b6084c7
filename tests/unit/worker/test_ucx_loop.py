"""A UCX thread that does not come up: whoever starts it is told, whatever went wrong. No UCX."""

import select
import threading
from collections.abc import Callable, Iterator

import pytest

from protocol.errors import ConfigError
from worker.transfer import ucx_loop
from worker.transfer.ucx_loop import UcxLoop

PATIENCE_S = 5.0


class FakeLibrary:
    """A library in which nothing ever happens; also its worker."""

    crash: Exception | None = None

    def __init__(self, device: str) -> None:
        if self.crash is not None:
            raise self.crash
        self.worker = self
        self._poll = select.epoll()  # closed with the object
        self.epoll_file_descriptor = self._poll.fileno()

    def progress_once(self) -> bool:
        return False

    def arm(self) -> bool:
        return True


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeLibrary]]:
    monkeypatch.setattr(ucx_loop, "Library", FakeLibrary)
    yield FakeLibrary
    FakeLibrary.crash = None


def started(first: Callable[[], None]) -> tuple[UcxLoop, list[BaseException]]:
    """The loop, and what its start raised. It must come back."""
    loop = UcxLoop("test-ucx", "lo")
    raised: list[BaseException] = []

    def start() -> None:
        try:
            loop.start(first)
        except BaseException as error:  # noqa: BLE001  the test looks at it
            raised.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "start waits for ever"
    return loop, raised


@pytest.mark.parametrize("crash", [ConfigError("no device lo"), ImportError("libucp.so: no file")])
def test_a_library_that_does_not_load_is_one_line(
    library: type[FakeLibrary], crash: Exception
) -> None:
    library.crash = crash
    loop, [error] = started(lambda: None)
    assert isinstance(error, ConfigError)
    assert str(crash) in str(error)
    assert loop.stop(PATIENCE_S)


@pytest.mark.parametrize("crash", [ConfigError("port taken"), OverflowError("port too large")])
def test_a_first_call_that_fails_is_one_line(library: type[FakeLibrary], crash: Exception) -> None:
    def first() -> None:
        raise crash

    loop, [error] = started(first)
    assert isinstance(error, ConfigError)
    assert str(crash) in str(error)
    assert not loop.call(lambda: None)
    assert loop.stop(PATIENCE_S)


def test_a_worker_that_cannot_be_waited_for_is_one_line(
    library: type[FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "arm", None)
    monkeypatch.setattr(library, "progress_once", None)
    loop, [error] = started(lambda: None)
    assert isinstance(error, ConfigError)
    assert not loop.call(lambda: None)


def test_a_loop_that_came_up_serves_until_it_is_stopped(library: type[FakeLibrary]) -> None:
    loop, raised = started(lambda: None)
    assert raised == []
    heard = threading.Event()
    assert loop.call(heard.set)
    assert heard.wait(PATIENCE_S)
    assert loop.stop(PATIENCE_S)


def test_a_library_that_makes_no_progress_any_more_ends_all_the_same(
    library: type[FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def broken(_self: FakeLibrary) -> bool:
        raise RuntimeError("device lost")

    loop, raised = started(lambda: None)
    assert not raised
    loop.at_end(ended.set)
    monkeypatch.setattr(library, "progress_once", broken)
    assert loop.call(lambda: None)
    assert ended.wait(PATIENCE_S)
    assert loop.stop(PATIENCE_S)

"""The thread of a NIXL agent that takes too long to open. No NIXL."""

import threading

import pytest

from protocol.errors import ConfigError
from worker.transfer import nixl_agent
from worker.transfer.nixl_agent import AgentThread
from worker.transfer.nixl_library import OpenAgent

PATIENCE_S = 5.0


def test_an_agent_that_comes_too_late_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_OPEN_S", 0.01)
    comes = threading.Event()

    def open_agent() -> OpenAgent:
        assert comes.wait(PATIENCE_S)
        return OpenAgent(object(), "UCX", (), (), (), ())  # type: ignore[arg-type]

    thread = AgentThread(open_agent, "a", max_peers=1, read_word=lambda slot: 0)
    with pytest.raises(ConfigError, match="no agent after"):
        thread.start()
    comes.set()
    thread._thread.join(PATIENCE_S)
    assert not thread.is_alive
    assert thread._opened is None

"""Is vLLM there, is it alive, does it move: a look at `/metrics` twice a second.

Silent and gone are two things. A server that does not answer may be frozen or busy: its step
counter stands still, and its jobs are moved. One that refuses connections, or that has been started
anew, has lost its KV: this worker ends, and its successor begins with an empty cache.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from protocol.errors import ConfigError
from worker.engine.vllm.client import VllmClient, VllmError
from worker.engine.vllm.facts import Metrics, ServedModel, read_metrics, read_models

_log = logging.getLogger("baton.engine")

LOOK_S: Final = 0.5
LOOK_TIMEOUT_S: Final = 2.0
SILENT_S: Final = 8.0
"""Silent for so long: open jobs fail. vLLM's front may be busy with a long prompt."""
_LONGEST_LOOK_S: Final = LOOK_S + LOOK_TIMEOUT_S
"""One look without an answer counts for no more: the rest was our own process standing still."""
STILL_S: Final = 60.0
"""Answers so long, owes us tokens and computes nothing: open jobs fail. A router asks this worker
about a quiet stream and is answered, so it alone would wait on. A cold server may compile."""
_REFUSE_SHARE: Final = 0.4
"""Silent for this part of it: new jobs fail at once."""
MAX_REFUSED: Final = 2
"""Connections refused in a row before the server is gone."""
START_LOOK_S: Final = 1.0
SAY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    model: ServedModel
    metrics: Metrics
    version: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look says; empty texts are good news."""

    dead: str = ""
    silent: str = ""
    moved: bool = False


class _Version(msgspec.Struct):
    version: str = ""


async def wait_for_vllm(
    client: VllmClient, wanted: str, *, timeout_s: float, clock: Callable[[], float]
) -> Found:
    """Loading a model takes minutes: wait, and say so. Raises ConfigError after `timeout_s`."""
    started_at = said_at = clock()
    while True:
        try:
            return await _find(client, wanted)
        except VllmError as error:
            if error.fault == "request":
                raise ConfigError(str(error)) from None
            now = clock()
            if now - started_at >= timeout_s:
                raise ConfigError(
                    f"no vLLM at {client.url} after {timeout_s:g} s: {error}"
                ) from None
            if now - said_at >= SAY_S or said_at == started_at:
                said_at = now
                _log.info("waiting for vLLM for up to %g s: %s", timeout_s, error)
        await asyncio.sleep(START_LOOK_S)


def read_version(body: bytes) -> str:
    """Empty where the server does not say it as vLLM does."""
    try:
        return msgspec.json.decode(body, type=_Version).version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


async def _find(client: VllmClient, wanted: str) -> Found:
    """Raises VllmError, ConfigError."""
    model = read_models(await client.get("/v1/models", timeout_s=5.0), wanted, client.url)
    body = await client.get("/metrics", timeout_s=5.0)
    try:
        metrics = read_metrics(body.decode(errors="replace"))
    except ValueError as error:
        raise ConfigError(f"{client.url}/metrics is not vLLM's: {error}") from None
    version = read_version(await client.get("/version", timeout_s=5.0))
    if not metrics.has_connector:
        _log.warning("vLLM at %s has no NIXL counters: it may not hand over blocks", client.url)
    return Found(model, metrics, version)


class Watch:
    """The last numbers, and how old they are. `is_busy`: vLLM owes us computed tokens."""

    def __init__(
        self,
        client: VllmClient,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        is_busy: Callable[[], bool],
        silent_s: float = SILENT_S,
    ) -> None:
        self._client = client
        self._clock = clock
        self._is_busy = is_busy
        self._limit_s = silent_s
        self._looked_at = clock()
        self.silent_s = 0.0
        """How long nothing has come, in looks without an answer."""
        self._still_s = 0.0
        self._num_refused = 0
        self.metrics = metrics
        self.steps = 0
        """Moves with what vLLM computes, and while it has nothing to compute."""

    @property
    def is_silent(self) -> bool:
        """Long enough to give it nothing new."""
        return self.silent_s > self._limit_s * _REFUSE_SHARE

    def moved(self) -> None:
        """A token came."""
        self.steps += 1
        self.silent_s = self._still_s = 0.0

    async def run(self, on_verdict: Callable[[Verdict], None]) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            on_verdict(await self.look())

    async def look(self) -> Verdict:
        try:
            body = await self._client.get("/metrics", timeout_s=LOOK_TIMEOUT_S)
            metrics = read_metrics(body.decode(errors="replace"))
        except VllmError as error:
            return self._on_failure(error)
        except ValueError as error:
            return self._on_failure(VllmError("server", f"/metrics: {error}"))
        return self._on_metrics(metrics)

    def _on_failure(self, error: VllmError) -> Verdict:
        self._num_refused = self._num_refused + 1 if error.fault == "gone" else 0
        if self._num_refused >= MAX_REFUSED:
            return Verdict(dead=f"vLLM is gone: {error}")
        self.silent_s += self._since_last_look()
        if self.silent_s >= self._limit_s:
            return Verdict(silent=f"vLLM has been silent for {self.silent_s:.1f} s: {error}")
        return Verdict()

    def _on_metrics(self, metrics: Metrics) -> Verdict:
        before, self.metrics = self.metrics, metrics
        self._num_refused = 0
        looked_s = self._since_last_look()
        self.silent_s = 0.0
        if metrics.started_at != before.started_at:
            return Verdict(dead="vLLM was started anew: its KV is gone")
        moved = metrics.iterations != before.iterations
        # an engine that froze while it was idle still claims that nothing runs
        is_busy = self._is_busy()
        if moved or not (metrics.running or is_busy):
            self.steps += 1
        self._still_s = self._still_s + looked_s if is_busy and not moved else 0.0
        if self._still_s >= STILL_S:
            return Verdict(silent=f"vLLM has computed nothing for {self._still_s:.1f} s")
        return Verdict(moved=moved)

    def _since_last_look(self) -> float:
        now = self._clock()
        before, self._looked_at = self._looked_at, now
        return min(now - before, _LONGEST_LOOK_S)

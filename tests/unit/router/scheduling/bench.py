"""A scheduler on a bench: virtual time, a stream view made of two dicts, and short constructors."""

import random
from dataclasses import replace
from typing import Any

from protocol.blocks import pack_ids
from protocol.events import LoadReport
from protocol.handoff import KvHandle
from protocol.out import FailureCode
from protocol.worker_info import Capacity, EngineTraits, KvLayout, Role, WorkerInfo
from router.scheduling import commands as cmd
from router.scheduling import events as ev
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler

BLOCK = 16


def info(
    worker: str,
    role: Role = "both",
    *,
    incarnation: str = "",
    model: str = "m",
    digest: str = "d",
    blocks: int = 1000,
    running: int = 8,
    context: int = 8192,
    traits: EngineTraits | None = None,
    draining: bool = False,
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker,
        incarnation=incarnation or f"{worker}-1",
        role=role,
        model=model,
        model_digest=digest,
        layout=KvLayout(BLOCK, 1024),
        capacity=Capacity(blocks, running, context),
        engine="simulated",
        traits=traits or EngineTraits(),
        draining=draining,
    )


def report(**values: Any) -> LoadReport:
    full: dict[str, Any] = {
        "running": 0, "waiting": 0, "num_blocks": 1000, "free_blocks": 1000, "lent_blocks": 0,
        "quarantined_blocks": 0, "steps": 0, "last_kv_event": 0,
    }  # fmt: skip
    return LoadReport(**{**full, **values})


def handle(worker: str, name: str = "h1", *, lease_s: float = 30.0) -> KvHandle:
    return KvHandle(name, worker, f"{worker}-1", 200, BLOCK, b"", lease_s, [])


def failed(attempt: int, code: FailureCode) -> ev.AttemptFailed:
    return ev.AttemptFailed(attempt, "decode", code, "why")


def hashes_of(text: str) -> list[bytes]:
    return [bytes(15) + c.encode() for c in text]


def submitted(choice: str = "c/0", *, tokens: int = 200, **values: Any) -> ev.Submitted:
    full: dict[str, Any] = {
        "choice": choice, "model": "m", "packed_prompt": pack_ids(range(tokens)),
        "num_prompt_tokens": tokens, "max_tokens": 64,
    }  # fmt: skip
    return ev.Submitted(**{**full, **values})


class Bench:
    """Feeds events and validates after each."""

    def __init__(self, limits: Limits | None = None, *, start: float = 100.0) -> None:
        self.now = start
        self.output: dict[str, int] = {}
        self.heard: dict[int, float] = {}
        limits = replace(limits or Limits(), local_prefill_tokens=64)
        self.scheduler = Scheduler(limits, self, random.Random(7))
        self.incarnations: dict[str, str] = {}
        self.next_report = start + 0.5

    def last_heard(self, attempt: int) -> float:
        return self.heard.get(attempt, float("-inf"))

    def num_output(self, choice: str) -> int:
        return self.output.get(choice, 0)

    def feed(self, event: ev.Event) -> list[cmd.Command]:
        commands = self.scheduler.handle(event, self.now)
        self.scheduler.validate()
        return commands

    def list_workers(self, *infos: WorkerInfo) -> None:
        """Listed and heard."""
        for one in infos:
            self.incarnations[one.worker_id] = one.incarnation
            self.feed(ev.WorkerListed(one))
            self.feed(ev.WorkerReported(one.worker_id, one.incarnation, report()))

    def report_all(self, *but: str) -> list[cmd.Command]:
        """Every worker reports, except those named."""
        out: list[cmd.Command] = []
        for worker, incarnation in self.incarnations.items():
            if worker not in but:
                out += self.feed(ev.WorkerReported(worker, incarnation, report()))
        return out

    def pass_time(self, seconds: float, *silent: str) -> list[cmd.Command]:
        """Serve every deadline on the way; workers not named report twice a second."""
        until = self.now + seconds
        out: list[cmd.Command] = []
        while True:
            due = self.scheduler.next_deadline()
            at = min(
                until, max(self.now, self.next_report), until if due is None else max(self.now, due)
            )
            self.now = at
            if due is not None and due <= at:
                out += self.feed(ev.Ticked())
            elif at >= self.next_report:
                self.next_report = at + 0.5
                if "*" not in silent:
                    out += self.report_all(*silent)
            elif at >= until:
                return out

    # -- the usual ways

    def pd(self, limits_decode: int = 1, **values: Any) -> None:
        """One prefill worker p, decode workers d1, d2, ..."""
        decoders = [info(f"d{n}", "decode", **values) for n in range(1, limits_decode + 1)]
        self.list_workers(info("p", "prefill"), *decoders)

    def to_transfer(self, choice: str = "c/0", **values: Any) -> tuple[int, cmd.StartDecode]:
        """Submitted, prefilled, pulling: (the prefill's attempt, the decode's start)."""
        start = only(self.feed(submitted(choice, **values)), cmd.StartPrefill)
        self.feed(ev.Accepted(start.attempt))
        out = self.feed(
            ev.Prefilled(start.attempt, handle(start.worker, f"h-{choice}"), ended=False)
        )
        return start.attempt, only(out, cmd.StartDecode)

    def to_decoding(self, choice: str = "c/0", **values: Any) -> cmd.StartDecode:
        start = self.to_transfer(choice, **values)[1]
        self.feed(ev.Accepted(start.attempt))
        self.feed(ev.DecodingStarted(start.attempt))
        self.heard[start.attempt] = self.now
        return start

    # -- the same without a prefill worker

    def to_decoding_local(self, choice: str) -> cmd.StartDecode:
        start = only(self.feed(submitted(choice)), cmd.StartDecode)
        self.feed(ev.DecodingStarted(start.attempt))
        self.heard[start.attempt] = self.now + 1000
        assert isinstance(start, cmd.StartDecode)
        return start


def only(commands: list[cmd.Command], kind: type[Any]) -> Any:
    """The one command of that type."""
    found = [c for c in commands if isinstance(c, kind)]
    assert len(found) == 1, commands
    return found[0]


def without_notes(commands: list[cmd.Command]) -> list[cmd.Command]:
    return [c for c in commands if not isinstance(c, cmd.Note)]


def ends(commands: list[cmd.Command]) -> list[tuple[str, str, str]]:
    """(outcome, leg, code) of every end."""
    return [(c.outcome, c.leg, c.code) for c in commands if isinstance(c, cmd.EndChoice)]


def notes(commands: list[cmd.Command]) -> list[tuple[str, str]]:
    return [(c.kind, c.cause) for c in commands if isinstance(c, cmd.Note)]

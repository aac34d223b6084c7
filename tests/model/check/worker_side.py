"""One worker process of the world: the real service, engine, pool, leases and pulls.

Only what touches the event loop, threads, memory and the clock is replaced: the mailer by a
postbox, the thread by `turn`, the arena by a list, the transport by `Reads`, the model by stamps.
A stamp is the hash of all tokens up to its position, chained with the stamp that is *found* before
it, so KV that is stale, missing or of another prompt gives other stamps and other tokens.
"""

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from itertools import count
from typing import Any, Final, Protocol

from protocol.blocks import pack_ids, seed_of
from protocol.bus import Message
from protocol.events import KvEvent
from protocol.jobs import Job
from protocol.subjects import Subjects
from protocol.worker_info import KvLayout
from tests.model.check.copies import NoText, constant
from tests.model.check.scopes import (
    LEASE_S,
    LINGER_S,
    ROUTER_TIMEOUT_S,
    SINK_TIMEOUT_S,
    Scope,
)
from tests.model.check.wire import Memory, Postbox, Reads, Violation, Words
from worker.engine.core import EngineCore
from worker.engine.messages import Message as EngineMessage
from worker.engine.messages import StepperConfig
from worker.engine.outputs import OutputDelivery, TurnOutputs
from worker.engine.runner import Chunk
from worker.engine.stepper import Stepper
from worker.outbox import Outbox
from worker.routers import Routers
from worker.service import Service

NAMESPACE: Final = "m"
MODEL: Final = "m"
DIGEST: Final = "digest"
SEED: Final = seed_of(DIGEST)
VOCABULARY: Final = 1 << 20
BEGINNING: Final = 1_048_576.0
"""Every process's clock begins here: what is much smaller is a duration."""
FIRST_SERIAL: Final = 3_000_001
FIRST_PULL: Final = 4_000_001
FIRST_NONCE: Final = 1 << 40


def subjects() -> Subjects:
    return constant("subjects", lambda: Subjects(NAMESPACE))


def stamp(before: bytes, token: int) -> bytes:
    """The KV of one position."""
    return blake2b(before + pack_ids([token]), digest_size=16).digest()


def next_token(stamps: Sequence[bytes]) -> int:
    """The model's answer to these positions."""
    folded = blake2b(b"".join(stamps), digest_size=4).digest()
    return 100 + int.from_bytes(folded, "big") % (VOCABULARY - 100)


def stamps_of(ids: Sequence[int]) -> list[bytes]:
    """What the KV of these tokens must be."""
    stamps: list[bytes] = []
    for token in ids:
        stamps.append(stamp(stamps[-1] if stamps else SEED, token))
    return stamps


def expected_output(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the undisturbed model says."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(stamps_of(ids)))
    return ids[len(prompt) :]


class StampRunner:
    """A `ModelRunner` whose KV is stamps."""

    model_digest = DIGEST
    max_context = 1 << 10
    vocab_size = VOCABULARY
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, memory: Memory, block_size: int) -> None:
        self.memory = memory
        self.block_size = block_size

    @property
    def layout(self) -> KvLayout:
        return KvLayout(self.block_size, 16)

    def step(self, chunks: Sequence[Chunk]) -> list[int | None]:
        return [self._run(chunk) for chunk in chunks]

    def at(self, blocks: Sequence[int], position: int) -> bytes:
        """The stamp that the memory has for this position, whatever it is."""
        block = self.memory.content[blocks[position // self.block_size]]
        place = position % self.block_size
        return block[place] if place < len(block) else b"nothing"

    def _run(self, chunk: Chunk) -> int | None:
        size, content = self.block_size, self.memory.content
        for position, token in enumerate(chunk.ids, chunk.start):
            before = self.at(chunk.blocks, position - 1) if position else SEED
            block, place = chunk.blocks[position // size], position % size
            old = content[block]
            head = (*old[:place], *[b"nothing"] * (place - len(old)))
            content[block] = (*head, stamp(before, token), *old[place + 1 :])
        if not chunk.sample:
            return None
        end = chunk.start + len(chunk.ids)
        return next_token([self.at(chunk.blocks, position) for position in range(end)])


class Wake:
    """Stands for the thread's event: the world decides when a turn runs."""

    def is_set(self) -> bool:
        return True


class NoGrammars:
    """Nobody asks for one."""


class Nonces:
    """Fresh words, never the same in any process."""

    def __init__(self, first: int) -> None:
        self.last = first

    def __call__(self) -> int:
        self.last += 1
        return self.last


class Owner(Protocol):
    """The process that they are parts of."""

    name: str
    incarnation: str
    is_prefill: bool
    service: "Desk"

    def clock(self) -> float: ...


class Thread(Stepper):
    """The real stepper without its thread."""

    def __init__(self, process: Owner, scope: Scope, first_nonce: int) -> None:
        num_blocks = scope.prefill_blocks if process.is_prefill else scope.decode_blocks
        self.memory = Memory(num_blocks)
        self.leases = Words(scope.num_leases)
        self.scratch = Words(scope.num_scratch)
        self.reads = Reads(
            process.incarnation, self.memory, self.scratch, "tcp" if scope.two_sided else "shm"
        )
        self._runner = StampRunner(self.memory, scope.block_size)
        self._arena = self.memory  # type: ignore[assignment]
        self._leases = self.leases  # type: ignore[assignment]
        self._scratch = self.scratch  # type: ignore[assignment]
        self._transfers = [self.reads]
        self._reasons = {}
        self._config = constant(
            ("config", scope, process.incarnation), lambda: _config(process, scope, num_blocks)
        )
        self._clock = process.clock
        self._nonce = Nonces(first_nonce)
        self._inbox: deque[EngineMessage] = deque()
        self._wake = Wake()  # type: ignore[assignment]
        self._serials = count(FIRST_SERIAL)
        self._delivery: OutputDelivery = OutputDelivery(process.service)
        limits = constant(("limits", scope), self._limits)
        tokenizer: Any = constant("tokenizer", NoText)
        self.core: EngineCore = self._build_core(tokenizer, limits, NoGrammars())  # type: ignore[arg-type]
        self.core._puller._next_id = FIRST_PULL

    def turn(self) -> None:
        """One turn of the engine's thread; what it says is heard at once."""
        self._turn(self.core, self._delivery)

    def _send(self, delivery: OutputDelivery, outputs: TurnOutputs) -> None:
        if outputs:
            delivery.deliver(outputs)

    @property
    def has_work(self) -> bool:
        """Whether a turn would do something without the clock moving on."""
        core = self.core
        return bool(self._inbox or core._known)


def _config(process: Owner, scope: Scope, num_blocks: int) -> StepperConfig:
    return StepperConfig(
        process.name,
        process.incarnation,
        max_running=scope.max_running,
        lease_s=LEASE_S,
        transfer_timeout_s=SINK_TIMEOUT_S,
        max_tokens_in_flight=scope.max_tokens_in_flight,
        max_quarantined_blocks=num_blocks,
        validate=True,
    )


class Silence:
    """No telemetry: the world reports for those that live."""

    draining = False

    def changed(self) -> None: ...

    def report(self) -> None: ...

    def leaving(self) -> None: ...

    def kv_events(self, first_id: int, events: Sequence[KvEvent]) -> None: ...


class Accepts:
    """Jobs whose `Accepted` is due, as `LateAccepts` keeps them."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.due: deque[Any] = deque()

    def add(self, key: Any) -> None:
        self.due.append(key)

    def fire(self) -> None:
        while self.due:
            self._outbox.accept(self.due.popleft())


class Desk(Service):
    """The real service without its loop."""

    def __init__(self, process: Owner) -> None:
        self._subjects = subjects()
        self._worker = process.name
        self._incarnation = process.incarnation
        self._clock = process.clock
        self._role = "prefill" if process.is_prefill else "decode"
        self._routers = Routers(timeout_s=ROUTER_TIMEOUT_S)
        self._refusing = ""
        self.num_bad = 0
        self.outbox = Outbox(self._post, linger_s=LINGER_S)
        self._accepts = Accepts(self.outbox)  # type: ignore[assignment]
        self.postbox = Postbox(self._envelope)
        self._mailer = self.postbox  # type: ignore[assignment]
        self.telemetry = Silence()  # type: ignore[assignment]

        self.broken = ""

    def _on_job(self, router: str, job: Job, message: Message) -> None:
        try:
            super()._on_job(router, job, message)
        except Exception as error:
            self.broken = f"{self._worker} broke over a {type(job).__name__}: {error!r}"
            raise

    def unhealthy(self, reason: str) -> None:
        raise Violation(f"{self._worker} is unhealthy: {reason}")

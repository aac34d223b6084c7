"""The clients of a simulated fleet: each listens to one choice and knows what it must get.

The answer of an undisturbed run is computed without a fleet, from the prompt alone; whatever stands
in the stream must be the beginning of it, token for token and letter for letter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.blocks import pack_ids
from protocol.errors import ClientError
from protocol.jobs import Tokens
from protocol.out import Delta
from protocol.sampling import Sampling
from router.choices import Choice, ChoiceSpec
from tests.sim.engine import tokenizer_of
from tests.sim.plan import Request
from tests.sim.processes import SimRouter
from worker.engine.simulated import SimulatedConfig, expected_tokens
from worker.engine.simulated_choice import EOS_ID


class Wrong(AssertionError):
    """A client got what it must not get."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an undisturbed run says."""

    ids: list[int]
    text: str
    finish: str


def answer_to(prompt: tuple[int, ...], sampling: Sampling, model: SimulatedConfig) -> Answer:
    ids = expected_tokens(prompt, sampling, sampling.max_tokens, model)
    tokenizer = tokenizer_of(model)
    ended = bool(ids) and ids[-1] == EOS_ID and not sampling.ignore_eos
    shown = ids[:-1] if ended else ids
    text = tokenizer.decode(shown)
    for stop in sampling.stop:
        at = text.find(stop)
        if at >= 0:
            return Answer(ids[: at + len(stop)], text[:at], "stop")
    return Answer(ids, text, "stop" if ended else "length")


@dataclass(eq=False)
class Client:
    """One choice. Its router calls `delta` and `ended`."""

    spec: ChoiceSpec
    router: SimRouter
    answer: Answer
    submitted_at: float
    cancel_at_token: int
    clock: Callable[[], float]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    last_at: float = 0.0
    longest_gap_s: float = 0.0
    """Between two tokens."""
    over_at: float | None = None
    error: ClientError | None = None
    cancelled: bool = False
    deserted: bool = False
    """Its router died: the client sees a broken connection."""

    def delta(self, choice: Choice, delta: Delta) -> None:
        if self.over_at is not None or self.finish:
            raise Wrong(f"{self.spec.choice}: a token after the end")
        if delta.index != len(self.ids):
            raise Wrong(f"{self.spec.choice}: token {delta.index} after {len(self.ids)}")
        now = self.clock()
        if self.ids:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_at)
        self.last_at = now
        self.ids += delta.ids
        self.text += delta.text
        self.finish = delta.finish
        if self.ids != self.answer.ids[: len(self.ids)]:
            raise Wrong(f"{self.spec.choice}: got {self.ids}, not {self.answer.ids}")
        if not self.answer.text.startswith(self.text):
            raise Wrong(f"{self.spec.choice}: text {self.text!r}, not {self.answer.text!r}")
        if 0 <= self.cancel_at_token <= len(self.ids) and not self.cancelled:
            self.cancel()

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        if self.over_at is not None:
            raise Wrong(f"{self.spec.choice}: ended twice")
        self.over_at = self.clock()
        self.error = error
        if error is None and (self.ids, self.text, self.finish) != (
            self.answer.ids, self.answer.text, self.answer.finish,
        ):  # fmt: skip
            raise Wrong(
                f"{self.spec.choice}: ended with {self.text!r} {self.finish}, "
                f"not {self.answer.text!r} {self.answer.finish}"
            )

    def cancel(self) -> None:
        """The client goes, or is taken for gone since it reads nothing."""
        self.cancelled = True
        self.router.dispatch.cancel(self.spec.choice)

    @property
    def over(self) -> bool:
        return self.over_at is not None or self.deserted


def make_clients(
    request: Request, number: int, router: SimRouter, model: SimulatedConfig, now: float
) -> list[Client]:
    """One for each choice of the request."""
    clients = []
    for index in range(request.n):
        sampling = Sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed + index,
            ignore_eos=request.ignore_eos,
        )
        if request.stop_at >= 0:
            text = answer_to(request.prompt, sampling, model).text
            stop = text[request.stop_at : request.stop_at + 2]
            if stop:
                sampling = Sampling(
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    seed=request.seed + index,
                    ignore_eos=request.ignore_eos,
                    stop=[stop],
                )
        spec = ChoiceSpec(
            f"q{number}/{index}",
            index,
            model.name,
            Tokens(pack_ids(request.prompt)),
            len(request.prompt),
            sampling,
            siblings=f"q{number}" if request.n > 1 else "",
        )
        answer = answer_to(request.prompt, sampling, model)
        clock = router.process.loop.time
        clients.append(Client(spec, router, answer, now, request.cancel_at_token, clock))
    return clients

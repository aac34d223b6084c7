"""Envelopes in, deltas to streams, legs to the scheduler: exactly once, in order, bounded."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from protocol.bus import Message
from protocol.codec import encode
from protocol.errors import ClientError
from protocol.handoff import KvHandle
from protocol.jobs import Cancel, Job, Release, Replay, Tokens
from protocol.out import (
    Accepted,
    Decoding,
    Delta,
    Failed,
    Out,
    OutEnvelope,
    Prefilled,
    Refused,
    StepFrame,
    TokenLogprob,
)
from protocol.sampling import Sampling
from protocol.subjects import Subjects
from router import attempts as attempts_module
from router import inbox as inbox_module
from router.attempts import Attempt, Attempts
from router.choices import Choice, ChoiceSpec
from router.inbox import Inbox
from router.metrics import RouterMetrics
from router.scheduling import events as ev

SUBJECTS = Subjects("test")


class Sink:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.crash = False

    def delta(self, choice: Choice, delta: Delta) -> None:
        if self.crash:
            raise ValueError("broken")
        assert delta.index == len(self.ids)
        self.ids += delta.ids

    def ended(self, choice: Choice, error: ClientError | None) -> None:
        raise AssertionError("the inbox ends nothing")


@dataclass
class World:
    now: float = 100.0
    fed: list[ev.Event] = field(default_factory=list)
    posted: list[tuple[str, str, Job]] = field(default_factory=list)
    timers: list[Callable[[], None]] = field(default_factory=list)
    attempts: Attempts = field(default_factory=Attempts)
    metrics: RouterMetrics = field(default_factory=lambda: RouterMetrics(CollectorRegistry()))
    seq: int = 0

    def __post_init__(self) -> None:
        self.inbox = Inbox(
            self.attempts,
            subjects=SUBJECTS,
            metrics=self.metrics,
            clock=lambda: self.now,
            feed=self.fed.append,
            post=self._post,
            later=lambda _delay, call: self.timers.append(call),
        )

    def _post(self, worker: str, incarnation: str, job: Job, *, lazy: bool = False) -> None:
        self.posted.append((worker, incarnation, job))

    def add(self, number: int, leg: str = "decode", *, prompt_logprobs: int = -1) -> Sink:
        sink = Sink()
        sampling = Sampling(64, prompt_logprobs=prompt_logprobs)
        spec = ChoiceSpec(f"q{number}/0", 0, "m", Tokens(b""), 0, sampling)
        choice = Choice(spec, sink, self.now)
        self.attempts.add(number, Attempt(choice, "w", "inc", leg, self.now, self.now))
        return sink

    def say(self, *outs: Out, seq: int | None = None, incarnation: str = "inc") -> None:
        self.seq = self.seq + 1 if seq is None else seq
        envelope = OutEnvelope("w", incarnation, self.seq, [*outs])
        self.inbox.on_out(Message(SUBJECTS.out("r", "w"), encode(envelope)))

    def jobs(self) -> list[Job]:
        posted, self.posted = self.posted, []
        return [job for _, _, job in posted]


@pytest.fixture
def world() -> World:
    return World()


def delta(attempt: int, index: int, *, finish: bool = False) -> Delta:
    return Delta(attempt, index, [index], "x", "length" if finish else "")


def handle() -> KvHandle:
    return KvHandle("h", "w", "inc", 2, 4, b"h" * 16, 30.0, [])


GAP = ev.GapSeen("w", "inc")


def test_a_hole_is_asked_for_once_and_filled_in_order(world: World) -> None:
    sink = world.add(1)
    world.say(StepFrame([delta(1, 0)]))
    world.say(StepFrame([delta(1, 2)]), seq=3)
    world.say(StepFrame([delta(1, 3)]))
    assert world.jobs() == [Replay(1, 1)]
    assert world.fed == [GAP]
    world.say(StepFrame([delta(1, index) for index in range(5)]))
    assert sink.ids == [0, 1, 2, 3, 4]


def test_a_hole_that_stays_is_asked_for_again_but_seldom(world: World) -> None:
    world.add(1)
    for _ in range(50):
        world.now += 0.01
        world.say(StepFrame([delta(1, 5)]))
    assert world.jobs() == [Replay(1, 0)] * 3


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_loss_repeat_and_disorder_gives_a_prefix_in_order(seed: int) -> None:
    rng = random.Random(seed)
    world = World()
    sink = world.add(1)
    frames = [(n, StepFrame([delta(1, n, finish=n == 29)])) for n in range(30)]
    mixed = [frame for frame in frames if rng.random() > 0.2]
    mixed += rng.sample(frames, 10)
    for index in range(0, len(mixed) - 3, 3):
        piece = mixed[index : index + 3]
        rng.shuffle(piece)
        mixed[index : index + 3] = piece
    for number, frame in mixed:
        world.now += 0.3
        world.say(frame, seq=number + 1)
    assert sink.ids == list(range(len(sink.ids)))
    for out in world.jobs():  # what the worker answers, even if twice
        assert isinstance(out, Replay)
        world.say(StepFrame([delta(1, n, finish=n == 29) for n in range(out.index, 30)]))
    world.say(StepFrame([delta(1, n, finish=n == 29) for n in range(len(sink.ids), 30)]))
    assert sink.ids == list(range(30))
    assert world.fed.count(ev.Ended(1)) == 1


def test_a_lost_tail_is_seen_when_it_has_not_come_a_little_later(world: World) -> None:
    world.say(Accepted(9))
    world.fed.clear()
    world.inbox.reported("w", "inc", 3)
    world.inbox.reported("w", "inc", 4)
    assert len(world.timers) == 1
    assert world.fed == []
    world.timers.pop()()
    assert world.fed == [GAP]
    world.inbox.reported("w", "inc", 4)
    world.timers.pop()()
    assert world.fed == [GAP, GAP]
    world.inbox.reported("w", "inc", 4)
    assert world.timers == []


def test_a_report_that_overtook_its_envelope_means_nothing(world: World) -> None:
    world.inbox.reported("w", "inc", 1)
    world.say(Refused(1, "x"))
    world.timers.pop()()
    assert world.fed == []


def test_a_report_of_a_worker_that_said_nothing_is_not_remembered(world: World) -> None:
    world.inbox.reported("w", "inc", 0)
    assert world.inbox.sources() == []


PROMPT = [None, TokenLogprob(-1.0)]


def test_no_token_before_the_prompts_numbers(world: World) -> None:
    """`Decoding` was lost: its numbers can be had only from this attempt, so it is asked first."""
    sink = world.add(1, prompt_logprobs=0)
    choice = world.attempts.live[1].choice
    for index in range(5):
        world.now += 0.06
        world.say(StepFrame([delta(1, index)]), seq=index + 2)
    assert (sink.ids, choice.first_at) == ([], 0.0)
    assert world.jobs() == [Replay(1, 0)] * 2
    world.say(Decoding(1, prompt_logprobs=PROMPT), StepFrame([delta(1, n) for n in range(6)]))
    assert sink.ids == [0, 1, 2, 3, 4, 5]
    assert choice.prompt_logprobs == PROMPT
    assert world.metrics.registry.get_sample_value("baton_ttft_seconds_count", {"model": "m"}) == 1


def test_a_worker_that_has_no_numbers_to_give_is_not_asked_for_ever(world: World) -> None:
    """The sink ends such a request; here it only must not wait."""
    sink = world.add(1, prompt_logprobs=0)
    world.say(Decoding(1), StepFrame([delta(1, 0)]))
    assert sink.ids == [0]
    assert world.jobs() == []


def test_a_prompts_numbers_are_taken_once_and_not_asked_for_again(world: World) -> None:
    sink = world.add(1, "prefill", prompt_logprobs=2)
    choice = world.attempts.live[1].choice
    assert choice.sampling.prompt_logprobs == 2
    world.say(Prefilled(1, 2, 0, delta(1, 0), handle(), prompt_logprobs=PROMPT))
    assert sink.ids == [0]
    assert choice.sampling == Sampling(64)
    world.attempts.add(2, Attempt(choice, "w", "inc", "decode", world.now, world.now))
    world.say(Decoding(2, prompt_logprobs=[None]), StepFrame([delta(2, 1)]))
    assert choice.prompt_logprobs == PROMPT
    assert sink.ids == [0, 1]


def test_strays_are_cancelled_once_a_second(world: World) -> None:
    for _ in range(20):
        world.now += 0.1
        world.say(StepFrame([delta(7, 0)]))
    assert world.jobs() in ([Cancel(7)] * 2, [Cancel(7)] * 3)


def test_a_stray_handle_is_given_back(world: World) -> None:
    world.say(Prefilled(7, 2, 0, None, handle()))
    assert world.jobs() == [Cancel(7), Release(["h"])]


def test_a_late_repeat_of_a_used_handle_releases_nothing(world: World) -> None:
    """The answer to a replay that crossed the outcome: its handle is on its way to a worker."""
    world.add(1, "prefill")
    world.say(Prefilled(1, 2, 0, delta(1, 0), handle()))
    world.attempts.drop(1, done=True)
    world.say(Prefilled(1, 2, 0, delta(1, 0), handle()))
    world.say(StepFrame([delta(1, 0)]))
    assert world.jobs() == []


def test_what_another_incarnation_says_changes_nothing(world: World) -> None:
    sink = world.add(1)
    world.say(StepFrame([delta(1, 0)]), Decoding(1), seq=1, incarnation="old")
    assert sink.ids == []
    assert world.fed == []
    assert world.posted == [("w", "old", Cancel(1))]


def test_a_worker_cannot_speak_for_another(world: World) -> None:
    for worker, incarnation in (("w", "inc"), ("x.y", "inc"), ("v", "no.name")):
        envelope = OutEnvelope(worker, incarnation, 1, [StepFrame([delta(7, 0)])])
        world.inbox.on_out(Message(SUBJECTS.out("r", "v"), encode(envelope)))
    assert world.jobs() == []
    assert world.inbox.sources() == []
    assert world.metrics.notes.of("bad_message", "wrong_name").value == 3


def test_repeated_outcomes_are_counted_once(world: World) -> None:
    world.add(1, "prefill")
    for _ in range(2):
        world.say(Prefilled(1, 2, 0, delta(1, 0), handle(), 0.1, 0.2))
    world.add(2)
    for _ in range(2):
        world.say(Decoding(2, 0, "shm", 100, 0.1))
    value = world.metrics.registry.get_sample_value
    assert value("baton_prefill_seconds_count", {"model": "m"}) == 1
    assert value("baton_kv_transfers_total", {"model": "m", "transport": "shm"}) == 1


def test_a_broken_stream_is_cancelled_and_the_rest_of_its_frame_arrives(world: World) -> None:
    bad, good = world.add(1), world.add(2)
    bad.crash = True
    world.say(StepFrame([delta(1, 0), delta(2, 0)]))
    assert good.ids == [0]
    assert world.fed == [ev.ClientGone("q1/0")]


def test_failures_are_told_with_their_leg(world: World) -> None:
    world.add(1)
    world.say(Failed(1, "transfer", "lease_lost", "why"))
    assert world.fed == [ev.AttemptFailed(1, "transfer", "lease_lost", "why")]


def test_rubbish_is_counted(world: World) -> None:
    world.inbox.on_out(Message(SUBJECTS.out("r", "w"), b"\xc1"))
    assert world.metrics.notes.of("bad_message", "undecodable").value == 1


def test_nobody_listens_tells_which_incarnation(world: World) -> None:
    subject = SUBJECTS.gone("r", "w", "inc7")
    world.inbox.on_out(Message(subject, b"", no_responders=True))
    assert world.fed == [ev.WorkerUnreachable("w", "inc7")]


def test_a_client_that_stopped_listening_is_told_once(world: World) -> None:
    gone: list[int] = []
    world.inbox.watch_client("5", lambda: gone.append(5))
    for _ in range(2):
        world.inbox.on_out(Message(SUBJECTS.client("r", "5"), b"", no_responders=True))
    assert gone == [5]


def test_only_workers_that_still_count_are_numbered(world: World) -> None:
    known = {("w", "inc"), ("w", "old")}
    world.inbox = Inbox(
        world.attempts,
        subjects=SUBJECTS,
        metrics=world.metrics,
        clock=lambda: world.now,
        feed=world.fed.append,
        post=world._post,
        later=lambda _delay, call: world.timers.append(call),
        is_known=lambda worker, incarnation: (worker, incarnation) in known,
    )
    for incarnation in ("inc", "old"):
        world.say(StepFrame([]), seq=1, incarnation=incarnation)
    known.remove(("w", "old"))
    world.inbox.forget_unknown()
    assert world.inbox.sources() == [("w", "inc")]
    world.say(StepFrame([]), seq=7, incarnation="old")  # a last word that was on its way
    world.inbox.reported("w", "old", 9)
    assert world.inbox.sources() == [("w", "inc")]
    assert (world.fed, world.timers) == ([], [])


def test_nothing_is_remembered_without_a_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_SOURCES", 50)
    for name in ("MAX_DONE", "MAX_STRAYS"):
        monkeypatch.setattr(attempts_module, name, 50)
    for number in range(500):
        world.say(StepFrame([delta(number, 0)]), seq=1, incarnation=f"inc{number}")
        world.attempts.drop(64 * number, done=True)
        world.inbox.reported("w", f"other{number}", 3)
    inbox, attempts = world.inbox, world.attempts
    assert len(inbox._sources) <= 50
    assert len(inbox._strays._answered) <= 50
    assert len(attempts._done) <= 50
    for number in range(500):
        world.inbox.forget_worker("w", f"other{number}")
        world.inbox.forget_worker("w", f"inc{number}")
    assert inbox.sources() == []

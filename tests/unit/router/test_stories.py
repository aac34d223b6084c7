"""What an operator is told of a request: whole, leg by leg, bounded, and of no other one."""

import gc
import weakref
from typing import Any

import pytest

from protocol.errors import ClientError
from protocol.jobs import Decode, Prefill
from protocol.out import Decoding, Failed, Prefilled, Refused, StepFrame
from router import stories as stories_module
from router.scheduling import events as ev
from router.scheduling.commands import EndChoice
from router.scheduling.lifecycle import LegTrace
from router.scheduling.tables import Past
from router.stories import Stories
from tests.unit.router.dispatch_world import delta, dispatching, handle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now - 100.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stories(clock: Clock) -> Stories:
    return make(clock)


def make(clock: Clock, past: Past | None = None) -> Stories:
    found = past or Past([(clock.now, "submitted", "")], ())
    return Stories(clock, clock.wall, lambda _choice: found)


def told(stories: Stories, wanted: str) -> dict[str, Any]:
    found = stories.of(wanted)
    assert found is not None, wanted
    return found


def served(
    stories: Stories, request: str, n: int = 1, outcome: Any = "completed", code: str = ""
) -> None:
    stories.began(request)
    error = ClientError(502, "it broke", code=code) if code else None
    for index in range(n):
        stories.submitted(f"{request}/{index}", "m")
        stories.choice_ended(EndChoice(f"{request}/{index}", outcome, "decode", code), error, 8)
    stories.over(request)
    stories.answered(request, "POST /v1/completions", error.status if error else 200, error)


def test_a_request_is_told_with_all_its_choices_or_one_of_them(
    stories: Stories, clock: Clock
) -> None:
    stories.began("q")
    for choice in ("q/0", "q/1"):
        stories.submitted(choice, "m")
    assert told(stories, "q")["state"] == "running"
    clock.now += 2.5
    stories.choice_ended(EndChoice("q/0", "completed", "decode", ""), None, 7)
    error = ClientError(502, "gave up [leg: decode]", code="attempts_exhausted")
    stories.choice_ended(
        EndChoice("q/1", "failed", "decode", "attempts_exhausted", "gave up"), error, 3
    )
    stories.over("q")
    stories.answered("q", "POST /v1/completions", 502, error)
    clock.now += 100.0
    whole = told(stories, "q")
    assert (whole["state"], whole["status"], whole["model"]) == ("ended", 502, "m")
    assert whole["took_s"] == 2.5
    assert whole["began"] == "2023-11-14T22:13:20.000+00:00"
    first, second = whole["choices"]
    assert (first["outcome"], first["status"], first["output_tokens"]) == ("completed", 200, 7)
    assert "error" not in first
    assert second["error"] == {"code": "attempts_exhausted", "message": "gave up [leg: decode]"}
    assert [one["choice"] for one in told(stories, "q/1")["choices"]] == ["q/1"]
    assert stories.of("q/2") is None
    assert stories.of("never") is None


def test_legs_have_worker_incarnation_times_and_cause(clock: Clock) -> None:
    legs = [
        LegTrace(4, "prefill", "p", "p-1", 100.5, 100.75, 0.0, 102.0, False, "prefill_timeout"),
        LegTrace(5, "local", "d", "d-7", 102.25, 102.5, 103.0),
    ]
    stories = make(clock, Past([(100.0, "submitted", ""), (102.0, "requeue", "x")], legs))
    stories.began("q")
    stories.submitted("q/0", "m")
    clock.now = 102.0
    stories.noted("q/0", "retry", "prefill_timeout", "p")
    first, second = told(stories, "q")["choices"][0]["legs"]
    assert first == {
        "leg": "prefill", "attempt": 4, "worker": "p", "incarnation": "p-1", "after_s": 0.5,
        "at": "2023-11-14T22:13:20.500+00:00", "accepted_after_s": 0.75, "ended_after_s": 2.0,
        "ended": "stopped", "cause": "prefill_timeout",
    }  # fmt: skip
    assert (second["decoding_after_s"], "ended" in second, "cause" in second) == (3.0, False, False)
    [chance] = told(stories, "q")["choices"][0]["second_chances"]
    assert (chance["what"], chance["cause"], chance["worker"]) == ("retry", "prefill_timeout", "p")
    assert (chance["after_s"], chance["at"]) == (2.0, "2023-11-14T22:13:22.000+00:00")
    lines = told(stories, "q")["choices"][0]["story"]
    assert [line["what"] for line in lines] == ["submitted", "requeue x"]
    assert [line["after_s"] for line in lines] == [0.0, 2.0]


def test_who_is_refused_before_admission_is_told_why(stories: Stories) -> None:
    error = ClientError(400, "no such field", code="invalid_type", param="n")
    stories.began("bad")
    stories.over("bad")
    stories.answered("bad", "POST /v1/completions", 400, error)
    found = told(stories, "bad")
    assert (found["state"], found["status"], found["choices"]) == ("refused", 400, [])
    assert found["error"] == {"code": "invalid_type", "message": "no such field", "param": "n"}
    denied = ClientError(401, "a key", code="invalid_api_key")
    stories.answered("door", "GET /v1/models", 401, denied, has_begun=False)
    assert told(stories, "door")["state"] == "refused"
    stories.answered("fine", "GET /v1/models", 200, has_begun=False)
    assert stories.of("fine") is None
    stories.began("list")
    stories.answered("list", "baton.x.api.models", 200)
    stories.over("list")
    assert stories.of("list") is None


def test_an_id_used_again_by_a_stranger_hides_nothing(stories: Stories) -> None:
    served(stories, "mine")
    denied = ClientError(401, "a key", code="invalid_api_key")
    stories.answered("mine", "POST /v1/completions", 401, denied, has_begun=False)
    found = told(stories, "mine")
    assert (found["state"], found["status"], len(found["choices"])) == ("ended", 200, 1)
    assert found["also_refused"]["error"]["code"] == "invalid_api_key"


def test_a_client_that_went_was_told_nothing(stories: Stories) -> None:
    stories.began("gone")
    stories.submitted("gone/0", "m")
    error = ClientError(499, "cancelled", code="cancelled")
    stories.choice_ended(EndChoice("gone/0", "cancelled", "decode", "cancelled"), error, 2)
    stories.over("gone")
    denied = ClientError(401, "a key", code="invalid_api_key")
    stories.answered("gone", "GET /", 401, denied, has_begun=False)
    found = told(stories, "gone")
    assert (found["status"], found["choices"][0]["outcome"]) == (None, "cancelled")


def test_what_has_ended_is_bounded_by_number(stories: Stories) -> None:
    for number in range(stories_module.MAX_ENDED + 50):
        served(stories, f"q{number}")
        stories.answered(f"r{number}", "x", 401, ClientError(401, "", code="k"), has_begun=False)
    assert len(stories) == stories_module.MAX_ENDED + stories_module.MAX_REFUSED
    assert stories.of("q0") is None
    assert stories.of("q50") is not None


def test_a_flood_of_refusals_does_not_push_out_what_was_served(stories: Stories) -> None:
    served(stories, "kept")
    for number in range(3 * stories_module.MAX_REFUSED):
        served(stories, f"full{number}", outcome="rejected", code="queue_full")
        error = ClientError(400, "", code="invalid_json")
        stories.answered(f"bad{number}", "x", 400, error, has_begun=False)
    assert stories.of("kept") is not None
    assert len(stories) == 1 + stories_module.MAX_REFUSED


def test_what_has_ended_is_bounded_by_bytes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories_module, "MAX_COST", 1 << 20)
    stories = make(clock, Past([(0.0, "x", "y" * 100)] * 64, ()))
    for number in range(200):
        served(stories, f"q{number}", n=16)
    assert 0 < len(stories) < 20
    assert stories.cost <= stories_module.MAX_COST
    assert stories.cost == sum(cost for _, cost in stories._ended.values())
    served(stories, "q199", n=16)
    assert stories.cost == sum(cost for _, cost in stories._ended.values())


def test_texts_of_others_are_cut(stories: Stories) -> None:
    stories.began("q")
    stories.submitted("q/0", "m")
    long = ClientError(500, "x" * 10_000, code="engine")
    stories.choice_ended(EndChoice("q/0", "failed", "decode", "engine"), long, 0)
    for _ in range(1000):
        stories.noted("q/0", "replay", "hole", "w")
    stories.over("q")
    stories.answered("q", "GET /" + "y" * 10_000, 500, long)
    found = told(stories, "q")
    assert len(str(found["choices"][0]["error"])) < 1000
    assert len(found["door"]) <= stories_module.MAX_TEXT
    assert len(found["choices"][0]["second_chances"]) == stories_module.MAX_CHANCES


async def test_every_second_chance_has_its_cause_and_worker() -> None:
    """A refusal, a failure, a hole in the stream: by the real driver and scheduler."""
    async with dispatching() as world:
        stories = world.dispatch.stories
        prefill = await world.worker("p", "prefill")
        first = await world.worker("d1", "decode")
        stories.began("q")
        client = world.submit("q/0")
        job = await prefill.job(Prefill)
        assert isinstance(job, Prefill)
        prefill.say(Prefilled(job.attempt, 16, 0, delta(job.attempt, 0), handle()))
        pull = await first.job(Decode)
        assert isinstance(pull, Decode)
        second = await world.worker("d2", "decode")
        first.say(Refused(pull.attempt, "draining"))
        again = await second.job(Decode)
        assert isinstance(again, Decode)
        world.dispatch.feed(ev.WorkerUnlisted("d1", "inc"))
        second.say(Decoding(again.attempt), StepFrame([delta(again.attempt, 2)]))
        await world.settle()
        second.say(Failed(again.attempt, "decode", "engine", "it broke"))
        await world.settle()
        found = told(stories, "q")["choices"][0]
        chances = [(c["what"], c["cause"], c["worker"]) for c in found["second_chances"]]
        assert ("refused", "draining", "d1") in chances
        assert ("replay", "hole", "d2") in chances
        assert ("resume", "engine", "d2") in chances
        legs = [(leg["leg"], leg["worker"], leg.get("cause")) for leg in found["legs"]]
        assert legs[:2] == [("prefill", "p", None), ("pull", "d1", "refused")]
        assert legs[2] == ("pull", "d2", "engine")
        assert all(leg["incarnation"] == "inc" for leg in found["legs"])
        assert found["legs"][0]["ended"] == "answered"
        world.dispatch.cancel("q/0")
        assert client.over


def test_an_error_does_not_keep_the_request_that_it_came_from(stories: Stories) -> None:
    """An exception holds its frames, and they hold bodies of megabytes."""

    class Body:
        """Stands for one."""

    def refuse(body: Body) -> None:
        assert body is not None
        raise ClientError(400, "no", code="invalid_value")

    body = Body()
    gone = weakref.ref(body)
    try:
        refuse(body)
    except ClientError as error:
        stories.answered("r", "POST /v1/completions", 400, error)
    del body
    gc.collect()
    assert gone() is None
    assert told(stories, "r")["error"]["code"] == "invalid_value"


def test_a_client_that_went_and_asks_again_under_the_same_id_is_told_of_the_later_one(
    stories: Stories, clock: Clock
) -> None:
    stories.began("r")
    stories.submitted("r/0", "m")
    stories.choice_ended(EndChoice("r/0", "cancelled", "decode", ""), None, 3)
    stories.over("r")
    clock.now += 1.0
    stories.began("r")
    refused = ClientError(400, "no", code="invalid_value")
    stories.over("r")
    stories.answered("r", "POST /v1/completions", 400, refused)
    shown = [record.status for record in stories._all("r")]
    assert shown.count(400) == 1
    newest = max(stories._all("r"), key=lambda record: record.began)
    assert newest.status == 400

"""A few rows of `make chaos`, one for each kind of trouble, and the measure they are taken with."""

import io
import time

import pytest

from tests.chaos.__main__ import chosen
from tests.chaos.clients import Client
from tests.chaos.runner import Runner, table
from tests.chaos.soak import Sample, slope_per_min
from tests.chaos.trial import leg_s
from tests.chaos.world import Step
from tests.e2e.streams import Ask

SHORT = (
    "kill/prefill/mid-pull",
    "restart/decode/handle-waiting",
    "term/prefill/in-prefill",
    "client-leaves/decode/mid-decode",
)


@pytest.mark.timeout(120)
@pytest.mark.xdist_group("chaos")
def test_short_rows() -> None:
    out = io.StringIO()
    runner = Runner("shm", out)
    runner.run(chosen(",".join(SHORT)))
    assert sorted(found["row"] for found in runner.done) == sorted(SHORT)
    assert {found["verdict"] for found in runner.done} == {"ok"}, out.getvalue()
    assert all(found["hit"] for found in runner.done), table(runner.done)


class Silent(Client):
    """A client that nobody runs."""

    def __init__(self, arrivals: list[float]) -> None:
        self.arrivals = arrivals
        self.started_at = 100.0
        self.error, self.broken = {}, ""
        self.status, self.text, self.finish, self.is_done = 200, "", "length", True
        self.may_fail = frozenset()
        self.request_id = "one"
        self.ask = Ask(prompt=(97, 98), max_tokens=4)

    def is_alive(self) -> bool:
        return False


def test_a_gap_is_counted_from_the_fault_on() -> None:
    assert Silent([101.0, 105.0, 105.5]).gap_after(103.0) == 2.0
    assert Silent([101.0, 102.0, 105.5]).gap_after(103.0) == 2.5
    assert Silent([101.0, 102.0]).gap_after(103.0) < 0.0
    failed = Silent([101.0])
    failed.error, failed.last_at = {"code": "x"}, 110.0
    assert failed.gap_after(103.0) == 7.0


def test_what_is_not_exact_is_wrong_even_where_an_error_is_right() -> None:
    client = Silent([])
    client.text = client.ask.expected()
    assert client.wrong() == ""
    client.error = {"code": "queue_timeout"}
    assert client.wrong()
    client.may_fail = frozenset({"queue_timeout"})
    assert client.wrong() == ""
    client.text = "?" + client.text[1:]
    assert client.wrong()


def test_only_expired_legs_buy_time() -> None:
    now = time.monotonic()
    assert leg_s(Step(now, "requeue", "silent")) == 2.5
    assert leg_s(Step(now, "requeue", "engine")) == 0.0
    assert leg_s(Step(now, "accepted", "silent")) == 0.0
    assert leg_s(Step(now, "transfer_failed", "shm: no progress for 3.0 s while pulling")) == 3.0
    assert leg_s(Step(now, "transfer_failed", "shm: gone: no such process")) == 0.0


def test_the_slope_is_of_megabytes_a_minute() -> None:
    samples = [
        Sample(at_s=second, rss_mb=50 + second / 30, fds=9, threads=3) for second in range(60)
    ]
    assert slope_per_min(samples) == pytest.approx(2.0)
    assert slope_per_min(samples[:2]) == 0.0

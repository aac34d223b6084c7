"""The decisions of one registration, step by step and under random faults."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.changes import encode_worker
from discovery.lease_keeper import (
    AskTwin,
    Command,
    Event,
    Failed,
    Grant,
    Granted,
    LeaseEnded,
    LeaseKeeper,
    Look,
    Refuse,
    Renew,
    Renewed,
    Seen,
    TwinAnswered,
    Wait,
    Woken,
    Write,
    Written,
)
from protocol.worker_info import Capacity, KvLayout, WorkerInfo

TTL_S = 9.0


def worker(incarnation: str = "i1", *, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(
        worker_id="w",
        incarnation=incarnation,
        role="decode",
        model="m",
        model_digest="d",
        layout=KvLayout(block_size=16, block_bytes=1024),
        capacity=Capacity(num_blocks=8, max_running=4, max_context=128),
        engine="simulated",
        draining=draining,
    )


MINE = encode_worker(worker())
OTHER = encode_worker(worker("i0"))


def keeper() -> LeaseKeeper:
    return LeaseKeeper(worker(), ttl_s=TTL_S, jitter=lambda: 0.0)


def registered(at: float = 0.0) -> LeaseKeeper:
    made = keeper()
    assert made.start(at) == Grant(TTL_S)
    assert made.handle(Granted(7, TTL_S), at) == Write(MINE, 7, 0)
    assert made.handle(Written(5), at) == Wait(at + 3)
    return made


def test_registers_and_renews_at_a_third_and_looks_at_its_key() -> None:
    made = registered()
    assert made.handle(Woken(), 1.0) == Wait(3.0)
    assert made.handle(Woken(), 3.0) == Renew(7)
    assert made.handle(Renewed(TTL_S), 3.1) == Look()
    assert made.handle(Seen(MINE, 5, 7), 3.2) == Wait(6.0)
    assert made.settled


def test_is_lost_a_ttl_after_the_last_confirmed_call_was_sent() -> None:
    made = registered()
    made.handle(Woken(), 3.0)
    made.handle(Renewed(TTL_S), 4.5)
    assert not made.lost(11.9)
    assert made.lost(12.0)


def test_is_lost_before_the_first_write() -> None:
    made = keeper()
    made.start(0)
    assert made.lost(0)
    made.handle(Granted(7, TTL_S), 0)
    assert made.lost(0)


def test_failed_renewal_is_repeated_with_backoff_and_keeps_the_lease() -> None:
    made = registered()
    assert made.handle(Woken(), 3.0) == Renew(7)
    assert made.handle(Failed(), 4.0) == Wait(4.05)
    assert made.handle(Woken(), 4.05) == Renew(7)
    assert made.handle(Failed(), 5.0) == Wait(5.1)
    for now in range(10, 100, 10):
        assert made.handle(Woken(), now) == Renew(7)
        made.handle(Failed(), now)
    assert made.handle(Woken(), 200.0) == Renew(7)
    assert made.handle(Renewed(TTL_S), 200.0) == Look()
    assert not made.lost(200.0)


def test_refused_caller_waits_longer() -> None:
    made = keeper()
    made.start(0)
    assert made.handle(Failed(denied=True), 1.0) == Wait(6.0)


def test_ended_lease_is_replaced_at_once() -> None:
    made = registered()
    made.handle(Woken(), 3.0)
    assert made.handle(LeaseEnded(), 3.1) == Grant(TTL_S)
    assert made.lost(3.1)
    assert made.lease_id == 0
    assert made.handle(Granted(8, TTL_S), 3.2) == Write(MINE, 8, 0)


def test_leases_that_end_before_they_carry_the_key_do_not_make_it_spin() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    assert made.handle(LeaseEnded(), 0) == Wait(0.05)
    assert made.handle(Woken(), 0.05) == Grant(TTL_S)


def test_store_may_grant_more_than_asked() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, 30.0), 0)
    assert made.handle(Written(5), 0) == Wait(10.0)
    assert not made.lost(29.9)


def test_change_is_written_under_the_same_lease_over_the_known_revision() -> None:
    made = registered()
    made.change(worker(draining=True))
    assert not made.settled
    assert made.handle(Woken(), 1.0) == Write(encode_worker(worker(draining=True)), 7, 5)
    assert made.handle(Written(6), 1.0) == Wait(3.0)
    assert made.settled


def test_change_while_a_write_is_under_way_is_written_after_it() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    made.change(worker(draining=True))
    assert made.handle(Written(5), 0) == Write(encode_worker(worker(draining=True)), 7, 5)


def test_change_of_identity_is_refused() -> None:
    with pytest.raises(ValueError, match="incarnation"):
        registered().change(worker("i2"))


def test_write_whose_answer_was_lost_is_recognised() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    made.handle(Failed(), 1.5)
    assert made.handle(Woken(), 1.6) == Write(MINE, 7, 0)
    assert made.handle(Seen(MINE, 5, 7), 1.7) == Wait(3.0)
    assert not made.lost(1.7)


def test_own_key_under_an_old_lease_is_written_over() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    assert made.handle(Seen(MINE, 5, 6), 0) == Write(MINE, 7, 5)


def test_unreadable_key_is_written_over() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    assert made.handle(Seen(b"junk", 5, 6), 0) == Write(MINE, 7, 5)


def test_vanished_key_is_written_again() -> None:
    made = registered()
    made.handle(Woken(), 3.0)
    made.handle(Renewed(TTL_S), 3.0)
    assert made.handle(Seen(None), 3.0) == Write(MINE, 7, 0)
    assert made.lost(3.0)


def test_dead_twin_is_taken_over_at_exactly_what_was_seen() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    assert made.handle(Seen(OTHER, 4, 6), 0) == AskTwin(worker("i0"))
    assert made.handle(TwinAnswered(alive=False), 0) == Write(MINE, 7, 4)
    assert made.handle(Seen(None), 0) == Write(MINE, 7, 0)


def test_living_twin_ends_a_newcomer() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    made.handle(Seen(OTHER, 4, 6), 0)
    assert made.handle(TwinAnswered(alive=True), 0) == Refuse(worker("i0"))


def test_unanswered_question_leads_to_a_new_look_at_the_key() -> None:
    made = keeper()
    made.start(0)
    made.handle(Granted(7, TTL_S), 0)
    made.handle(Seen(OTHER, 4, 6), 0)
    assert made.handle(Failed(), 0) == Wait(0.05)
    assert made.handle(Woken(), 0.05) == Write(MINE, 7, 0)


def test_displaced_worker_waits_and_comes_back_when_the_other_is_gone() -> None:
    made = registered()
    made.handle(Woken(), 3.0)
    made.handle(Renewed(TTL_S), 3.0)
    assert made.handle(Seen(OTHER, 9, 8), 3.0) == AskTwin(worker("i0"))
    assert made.lost(3.0)
    assert made.handle(TwinAnswered(alive=True), 3.0) == Wait(6.0)
    assert made.handle(Woken(), 6.0) == Renew(7)
    assert made.handle(Renewed(TTL_S), 6.0) == Write(MINE, 7, 0)
    assert made.handle(Written(11), 6.0) == Wait(9.0)
    assert not made.lost(6.0)


class Server:
    """A store with one key, whose leases expire on a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.leases: dict[int, float] = {}
        self.num_leases = 0
        self.revision = 1
        self.key: Seen = Seen(None)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.leases = {i: at for i, at in self.leases.items() if at > self.now}
        if self.key.value is not None and self.key.lease_id not in self.leases:
            self.key = Seen(None)

    def answer(self, command: Command, living: set[str]) -> Event:
        match command:
            case Grant(ttl_s):
                self.num_leases += 1
                self.leases[self.num_leases] = self.now + ttl_s
                return Granted(self.num_leases, ttl_s)
            case Renew(lease_id):
                if lease_id not in self.leases:
                    return LeaseEnded()
                self.leases[lease_id] = self.now + TTL_S
                return Renewed(TTL_S)
            case Write(value, lease_id, mod_revision):
                return self.write(value, lease_id, mod_revision)
            case AskTwin(info):
                return TwinAnswered(info.incarnation in living)
            case _:
                assert isinstance(command, Look)
                return self.key

    def write(self, value: bytes, lease_id: int, mod_revision: int) -> Event:
        if lease_id not in self.leases:
            return LeaseEnded()
        if mod_revision != self.key.mod_revision:
            return self.key
        self.revision += 1
        self.key = Seen(value, self.revision, lease_id)
        return Written(self.revision)

    def holder(self) -> str:
        if self.key.value is None:
            return ""
        return msgspec.json.decode(self.key.value, type=WorkerInfo).incarnation


class Process:
    """A keeper and the command it waits for."""

    def __init__(self, incarnation: str, server: Server) -> None:
        self.incarnation = incarnation
        self.server = server
        self.keeper = LeaseKeeper(worker(incarnation), ttl_s=TTL_S, jitter=lambda: 0.5)
        self.command = self.keeper.start(server.now)

    def step(self, living: set[str], fault: str, delay_s: float) -> None:
        server = self.server
        if isinstance(self.command, Wait):
            server.pass_time(min(delay_s + 0.1, max(0.0, self.command.until - server.now)))
            event: Event = Woken()
        else:
            server.pass_time(delay_s)
            event = Failed()
            if fault != "unsent":
                event = server.answer(self.command, living)
            server.pass_time(delay_s)
            if fault == "unanswered":
                event = Failed()
        self.command = self.keeper.handle(event, server.now)


steps = st.lists(
    st.tuples(
        st.sampled_from(["step0"] * 5 + ["step1"] * 4 + ["pause"] * 2 + ["begin1", "crash0"]),
        st.sampled_from(["none", "none", "unsent", "unanswered"]),
        st.integers(0, 25),
    ),
    min_size=15,
    max_size=60,
)


@settings(deadline=None)
@given(steps)
def test_who_is_not_lost_holds_the_key_and_someone_living_gets_it(
    script: list[tuple[str, str, int]],
) -> None:
    server = Server()
    running: dict[str, Process] = {"0": Process("i0", server)}

    def go(name: str, fault: str, delay_s: float) -> None:
        process = running[name]
        process.step({one.incarnation for one in running.values()}, fault, delay_s)
        if isinstance(process.command, Refuse):
            assert process.command.info.incarnation in {p.incarnation for p in running.values()}
            del running[name]

    for _ in range(3):
        go("0", "none", 0.0)
    for what, fault, tenths in script:
        name, delay_s = what[-1], tenths / 10
        if what.startswith("step") and name in running:
            go(name, fault, delay_s)
        elif what == "crash0":
            running.pop("0", None)
        elif what == "begin1":
            running.setdefault("1", Process("i1", server))
        elif what == "pause":
            server.pass_time(delay_s * 5)
        for process in running.values():
            assert process.keeper.lost(server.now) or server.holder() == process.incarnation
    for _ in range(200):
        for name in list(running):
            go(name, "none", 0.05)
    if running:
        assert server.holder() in {one.incarnation for one in running.values()}
        assert any(not one.keeper.lost(server.now) for one in running.values())

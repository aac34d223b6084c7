"""Where grammars are made: whom a thread serves next, and whom none does."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from protocol.ids import JobKey
from protocol.sampling import Sampling
from text.assets import byte_assets
from text.tokenizer import Tokenizer
from worker.engine import grammar_desk
from worker.engine.grammar import GrammarCompiler, GrammarError, GrammarState
from worker.engine.grammar_desk import GrammarDesk
from worker.engine.messages import GrammarMade

PATIENCE_S = 20.0
OBJECT = '{"type":"object"}'
BYTES = Tokenizer.from_assets(byte_assets())


class Posted:
    """What a desk posts."""

    def __init__(self) -> None:
        self.made: list[GrammarMade] = []
        self._more = threading.Condition()

    def __call__(self, message: GrammarMade) -> None:
        with self._more:
            self.made.append(message)
            self._more.notify()

    def wait(self, count: int) -> list[GrammarMade]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.made) >= count, PATIENCE_S)
        return self.made


class Compiler:
    """Hard schemas take until the test opens the gate; bad ones have an error, evil ones panic."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        """As often as a hard schema was begun."""
        self.compiled: list[str] = []
        self._known: set[str] = set()

    def state(
        self, schema: str, output_ids: Sequence[int] = (), *, ignore_eos: bool = False
    ) -> object:
        if schema not in self._known:
            self.compiled.append(schema)
            if "hard" in schema:
                self.entered.release()
                assert self.gate.wait(PATIENCE_S)
            if "bad" in schema:
                raise GrammarError(schema)
            if "evil" in schema:
                raise BaseException("thread panicked\nat some line")  # as the library's panics are
            self._known.add(schema)
        return schema, *output_ids


class World:
    """A desk, its compiler, and who asks."""

    def __init__(self) -> None:
        self.compiler = Compiler()
        self.posted = Posted()
        self.desk = GrammarDesk(self.compiler, self.posted)  # type: ignore[arg-type]
        self.num_asked = 0

    def ask(self, schema: str, *output_ids: int) -> JobKey | None:
        """None if it is refused."""
        self.num_asked += 1
        key, sampling = JobKey("r", self.num_asked), Sampling(9, grammar=schema)
        return key if self.desk.request(key, self.num_asked, sampling, output_ids) else None

    def results(self, count: int) -> list[object]:
        return [message.result for message in self.posted.wait(count)]

    def occupy(self) -> None:
        """No thread can compile before the gate is opened."""
        for number in range(2):
            assert self.ask(f"hard {number}")
            assert self.compiler.entered.acquire(timeout=PATIENCE_S)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.compiler.gate.set()
    made.desk.stop()


def test_each_wish_is_answered_behind_its_output() -> None:
    posted = Posted()
    desk = GrammarDesk(GrammarCompiler(BYTES), posted)
    desk.request(JobKey("r", 1), 5, Sampling(9, grammar=OBJECT), b"{")
    desk.request(JobKey("r", 2), 6, Sampling(9, grammar="["), ())
    desk.request(JobKey("r", 3), 7, Sampling(9, grammar=OBJECT), b"x")
    made = {message.key.attempt: message for message in posted.wait(3)}
    assert isinstance(made[1].result, GrammarState)
    assert made[1].result.allowed[ord("}") >> 3] >> (ord("}") & 7) & 1
    assert made[1].serial == 5
    assert isinstance(made[2].result, str)
    assert isinstance(made[3].result, str)
    assert "output so far" in made[3].result
    desk.stop()


def test_panic_is_an_answer_and_ends_no_thread(world: World) -> None:
    for number in range(5):
        world.ask(f"evil {number}")
    assert world.results(5) == ["the schema cannot be compiled: BaseException"] * 5


def test_slow_schema_does_not_hold_up_the_next(world: World) -> None:
    world.ask("hard")
    world.ask("quick")
    assert world.results(1) == [("quick",)]


def test_schema_that_nobody_waits_for_is_not_compiled(world: World) -> None:
    world.occupy()
    keys = [world.ask("left"), world.ask("shared"), world.ask("shared"), world.ask("last")]
    for key, schema in zip(keys, ["left", "shared"], strict=False):
        assert key is not None
        world.desk.withdraw(key, schema)
    world.compiler.gate.set()
    assert len(world.results(4)) == 4
    assert sorted(world.compiler.compiled) == ["hard 0", "hard 1", "last", "shared"]
    assert not {message.key for message in world.posted.made} & set(keys[:2])


def test_what_is_compiled_does_not_stand_behind_what_is_not(world: World) -> None:
    world.ask("known")
    world.results(1)
    world.occupy()
    world.ask("waits")
    world.ask("known", 7)
    assert world.results(2)[1:] == [("known", 7)]
    assert "waits" not in world.compiler.compiled


@pytest.mark.parametrize("schema", ["hard", "hard and bad"])
def test_schema_of_many_is_compiled_once(world: World, schema: str) -> None:
    for number in range(10):
        world.ask(schema, number)
    world.compiler.gate.set()
    results = world.results(10)
    assert world.compiler.compiled == [schema]
    if "bad" in schema:
        assert results == [schema] * 10
    else:
        assert {*results} == {(schema, number) for number in range(10)}


def test_schemas_that_wait_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_desk, "MAX_UNCOMPILED", 3)
    world.ask("known")
    world.results(1)
    world.occupy()
    first = world.ask("schema 0")
    assert first
    assert world.ask("schema 1")
    assert world.ask("schema 2")
    assert world.ask("schema 3") is None
    assert world.ask("known")
    assert world.ask("schema 2")
    assert world.ask("hard 0")
    world.desk.withdraw(first, "schema 0")
    assert world.ask("schema 3")
    world.compiler.gate.set()
    answered = {result[0] for result in world.results(9) if isinstance(result, tuple)}
    assert answered == {"known", "hard 0", "hard 1", "schema 1", "schema 2", "schema 3"}


def test_schemas_long_unused_wait_like_new_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler has forgotten them too."""
    monkeypatch.setattr(grammar_desk, "_MAX_COMPILED", 2)
    for count, schema in enumerate(["a", "b", "a", "c"], 1):
        world.ask(schema)
        world.results(count)
    world.occupy()
    world.ask("b")
    world.ask("a")
    assert world.results(5)[4:] == [("a",)]


def test_stop_does_not_wait_for_the_backlog(world: World) -> None:
    world.occupy()
    for number in range(50):
        world.ask(f"waits {number}")
    world.desk.stop()
    world.compiler.gate.set()
    for thread in world.desk._threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert world.compiler.compiled == ["hard 0", "hard 1"]

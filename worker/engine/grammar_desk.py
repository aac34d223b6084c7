"""Grammars are made here, off the engine's thread: a hard schema must not stall a step.

Wishes of one schema wait together. Once it is compiled, all of them are ready: each is then taken
behind its own output, ahead of every schema that is still to be compiled. The threads start with
the first wish, and share the tables below under one lock; what they make goes to the engine's
inbox. It knows no sequences and no library.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.ids import JobKey
from protocol.sampling import Sampling
from worker.engine.grammar import GrammarCompiler, GrammarError, GrammarState
from worker.engine.messages import GrammarMade

_MAX_COMPILING: Final = 2
_NUM_THREADS: Final = _MAX_COMPILING + 1
"""One is always free for what is compiled already."""
COMPILE_TIMEOUT_S: Final = 20.0
"""A sequence waits this long for its grammar; the worst schemas found took a second."""
MAX_UNCOMPILED: Final = 128
"""Schemas that wait to be compiled. Of hard ones, 0.3 s each, just so many are compiled before
their sequences are given up: who came later would wait in vain."""
_MAX_COMPILED: Final = 32
"""Schemas known to be compiled: fewer than the compiler keeps, so that it still has them."""


@dataclass(frozen=True, slots=True)
class _Wish:
    key: JobKey
    serial: int
    sampling: Sampling
    output_ids: Sequence[int]


_Wishes = dict[JobKey, _Wish]


class GrammarDesk:
    """Takes schemas, gives grammar states. `request` and `withdraw` are for the engine's thread,
    which alone knows who still waits; `stop` is for any."""

    def __init__(self, compiler: GrammarCompiler, post: Callable[[GrammarMade], None]) -> None:
        """`post` is called from this desk's threads."""
        self._compiler = compiler
        self._post = post
        self._changed = threading.Condition()
        """Guards everything below but the threads."""
        self._uncompiled: dict[str, _Wishes] = {}
        """By schema, the longest waiting first. Each has a wish: nothing is compiled for nobody."""
        self._compiling: dict[str, _Wishes] = {}
        """By schema, what waits for a thread that is at it."""
        self._ready: _Wishes = {}
        """Their schemas are compiled. No more than the engine has sequences."""
        self._compiled: OrderedDict[str, None] = OrderedDict()
        """The least recently used first. A guess, as the compiler forgets by itself: if it is
        wrong, a schema is compiled once more, and still not in the engine's thread."""
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def request(
        self, key: JobKey, serial: int, sampling: Sampling, output_ids: Sequence[int]
    ) -> bool:
        """Make the grammar of `sampling` and take it behind `output_ids`; the answer is posted.
        False: too many schemas wait, and there will be no answer."""
        if not self._threads:
            for number in range(_NUM_THREADS):
                name = f"baton-grammar-{number}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()
        with self._changed:
            self._changed.notify()
            return self._file(_Wish(key, serial, sampling, output_ids))

    def withdraw(self, key: JobKey, schema: str) -> None:
        """Nobody waits for it any more. What a thread is at goes to its end and is posted."""
        with self._changed:
            self._ready.pop(key, None)
            self._compiling.get(schema, {}).pop(key, None)
            wishes = self._uncompiled.get(schema, {})
            if wishes.pop(key, None) is not None and not wishes:
                del self._uncompiled[schema]

    def stop(self) -> None:
        """No more answers are awaited; the threads end with what they are at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _file(self, wish: _Wish) -> bool:
        """Put it where it waits."""
        schema = wish.sampling.grammar
        if schema in self._compiled:
            self._compiled.move_to_end(schema)
            self._ready[wish.key] = wish
        elif schema in self._compiling:
            self._compiling[schema][wish.key] = wish
        elif schema in self._uncompiled or len(self._uncompiled) < MAX_UNCOMPILED:
            self._uncompiled.setdefault(schema, {})[wish.key] = wish
        else:
            return False
        return True

    # the threads

    def _work(self) -> None:
        while (task := self._take()) is not None:
            if isinstance(task, _Wish):
                self._answer(task, self._make(task.sampling, task.output_ids))
            else:
                self._compile(task)

    def _take(self) -> _Wish | Sampling | None:
        """A wish that is ready, else one whose schema is to be compiled; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ready or self._may_compile())
            if self._stopped:
                return None
            if self._ready:
                return self._ready.pop(next(iter(self._ready)))
            schema = next(iter(self._uncompiled))
            wishes = self._compiling[schema] = self._uncompiled.pop(schema)
            return next(iter(wishes.values())).sampling

    def _may_compile(self) -> bool:
        return bool(self._uncompiled) and len(self._compiling) < _MAX_COMPILING

    def _compile(self, sampling: Sampling) -> None:
        """All who wait for this schema are ready then, or have its error."""
        schema, made = sampling.grammar, self._make(sampling)
        with self._changed:
            wishes = self._compiling.pop(schema)
            if not isinstance(made, str):
                self._compiled[schema] = None
                if len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
                self._ready.update(wishes)
            self._changed.notify_all()
        if isinstance(made, str):
            for wish in wishes.values():
                self._answer(wish, made)

    def _answer(self, wish: _Wish, result: GrammarState | str) -> None:
        self._post(GrammarMade(wish.key, wish.serial, result))

    def _make(self, sampling: Sampling, output_ids: Sequence[int] = ()) -> GrammarState | str:
        try:
            return self._compiler.state(
                sampling.grammar, output_ids, ignore_eos=sampling.ignore_eos
            )
        except GrammarError as error:
            return str(error)
        except BaseException as error:  # noqa: BLE001  a panic of the library is none of ours
            return f"the schema cannot be compiled: {type(error).__name__}"

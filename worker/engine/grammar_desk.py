"""Grammars are made here, off the engine's thread: a hard schema must not stall a step.

Two threads, started with the first schema; what they make goes to the engine's inbox. It knows no
sequences and no library.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.ids import JobKey
from protocol.sampling import Sampling
from worker.engine.grammar import GrammarCompiler, GrammarError, GrammarState
from worker.engine.messages import GrammarMade

_NUM_THREADS: Final = 2
COMPILE_TIMEOUT_S: Final = 20.0
"""A sequence waits this long for its grammar; the worst schemas found took a second."""


@dataclass(frozen=True, slots=True)
class _Wish:
    key: JobKey
    serial: int
    sampling: Sampling
    output_ids: Sequence[int]


class GrammarDesk:
    """Takes schemas, gives grammar states. `request` and `stop` are for one thread."""

    def __init__(self, compiler: GrammarCompiler, post: Callable[[GrammarMade], None]) -> None:
        """`post` is called from this desk's threads."""
        self._compiler = compiler
        self._post = post
        self._wishes: queue.SimpleQueue[_Wish | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def request(
        self, key: JobKey, serial: int, sampling: Sampling, output_ids: Sequence[int]
    ) -> None:
        """Make the grammar of `sampling` and take it behind `output_ids`; the answer is posted."""
        if not self._threads:
            for number in range(_NUM_THREADS):
                name = f"baton-grammar-{number}"
                self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads[-1].start()
        self._wishes.put(_Wish(key, serial, sampling, output_ids))

    def stop(self) -> None:
        """No more answers are awaited; the threads end with what they are at."""
        for _ in self._threads:
            self._wishes.put(None)

    def _work(self) -> None:
        while (wish := self._wishes.get()) is not None:
            self._post(GrammarMade(wish.key, wish.serial, self._make(wish)))

    def _make(self, wish: _Wish) -> GrammarState | str:
        sampling = wish.sampling
        try:
            return self._compiler.state(
                sampling.grammar, wish.output_ids, ignore_eos=sampling.ignore_eos
            )
        except GrammarError as error:
            return str(error)
        except BaseException as error:  # noqa: BLE001  a panic of the library is none of ours
            return f"the schema cannot be compiled: {type(error).__name__}"

"""Copies of a process's whole state: pickled by C, with what never changes left out.

Machines hold tables of bound methods and references to settings. The former are made anew, the
latter are named: `constant` gives a value a number, and every copy refers to the one original.
"""

import copyreg
import io
import pickle
from collections import ChainMap
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Final, TypeVar

from protocol.subjects import Subjects
from protocol.worker_info import WorkerInfo
from router.choices import ChoiceSpec
from router.scheduling.attempt_events import AttemptEvents
from router.scheduling.events import Submitted
from router.scheduling.fleet_events import FleetEvents
from router.scheduling.limits import Limits
from router.scheduling.scheduler import Scheduler
from text.output import OutputText
from text.tokenizer import Tokenizer
from worker.engine.messages import StepperConfig
from worker.engine.sequences import ModelLimits

T = TypeVar("T")

_constants: Final[list[Any]] = []
_numbers: Final[dict[Hashable, int]] = {}
_number_of: Final[dict[int, int]] = {}


def constant(key: Hashable, make: Callable[[], T]) -> T:
    """The value of this name, the same object in all copies of all states."""
    number = _numbers.get(key)
    if number is None:
        value = make()
        number = _numbers[key] = len(_constants)
        _constants.append(value)
        _number_of[id(value)] = number
    found: T = _constants[number]
    return found


def recall(number: int) -> Any:
    return _constants[number]


def constant_number(value: object) -> int | None:
    """Its number, if it is a constant."""
    return _number_of.get(id(value))


def _named(value: object) -> tuple[Any, ...]:
    number = _number_of.get(id(value))
    if number is None:  # equal values made elsewhere: kept for good, there are few
        number = len(_constants)
        _constants.append(value)
        _number_of[id(value)] = number
    return recall, (number,)


def _scheduler(scheduler: Scheduler) -> tuple[Any, ...]:
    state = (scheduler._t, scheduler._mover, scheduler._placer)
    return object.__new__, (Scheduler,), state, None, None, _wire_scheduler


def _wire_scheduler(scheduler: Scheduler, state: tuple[Any, ...]) -> None:
    tables, mover, placer = state
    scheduler._t, scheduler._mover, scheduler._placer = tables, mover, placer
    scheduler._listen(AttemptEvents(tables, mover), FleetEvents(tables, mover), mover._suspects)


def _text(text: OutputText) -> tuple[Any, ...]:
    """The model's tokens have no text, so there is nothing between two of them."""
    return _text_again, (text.num_tokens,)


class NoText:
    """A tokenizer whose tokens are written as nothing."""

    decoding = None

    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""

    def is_special(self, token_id: int) -> bool:
        return True


def _text_again(num_tokens: int) -> OutputText:
    text = OutputText(constant("tokenizer", NoText))  # type: ignore[arg-type]
    text.num_tokens = num_tokens
    return text


_NAMED: Final = (
    Limits, ModelLimits, StepperConfig, Subjects, WorkerInfo, Submitted, ChoiceSpec, Tokenizer,
    NoText,
)  # fmt: skip


class Copier(pickle.Pickler):
    dispatch_table: ClassVar[Any] = ChainMap(
        {**dict.fromkeys(_NAMED, _named), Scheduler: _scheduler, OutputText: _text},
        copyreg.dispatch_table,
    )


def name_constants(*kinds: type) -> None:
    """Objects of these classes never change either."""
    for kind in kinds:
        Copier.dispatch_table.maps[0][kind] = _named


def freeze(process: object) -> bytes:
    out = io.BytesIO()
    Copier(out, pickle.HIGHEST_PROTOCOL).dump(process)
    return out.getvalue()


def thaw(frozen: bytes) -> Any:
    return pickle.loads(frozen)

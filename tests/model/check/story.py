"""A counterexample as a reader wants it: one line for each thing that happens, in our own words."""

from collections.abc import Sequence
from typing import Any

from protocol.codec import decode_jobs, decode_out
from protocol.errors import BadMessage
from protocol.out import StepFrame
from tests.model.check.fleet import Fleet
from tests.model.check.state import Action, State
from tests.model.check.wire import Violation

_DEADLINES = {
    "lease": "expires what nobody renewed",
    "sink": "gives up a pull that is silent",
    "linger": "forgets what it kept for a replay",
    "accept": "says that its jobs are here",
    "router_silent": "stops the jobs of a router that is silent",
}


def told(fleet: Fleet, actions: Sequence[Action], violation: str) -> str:
    """The whole story, the violation last."""
    names = _Names()
    lines = ["all workers live and are idle; every choice is submitted"]
    try:
        state = fleet.beginning()
    except Violation:
        return "\n".join([*lines, f"  => {violation}"])
    for action in actions:
        line = describe(fleet, state, action, names)
        try:
            state = fleet.after(state, action)
        except Violation:
            lines.append(line)
            break
        lines.append(line)
    numbered = [f"{number:3}. {line}" for number, line in enumerate(lines)]
    return "\n".join([*numbered, f"  => {violation}"])


class _Names:
    """Attempts by their order."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def attempt(self, number: int) -> str:
        return f"attempt {self.known.setdefault(number, len(self.known) + 1)}"


def describe(fleet: Fleet, state: State, action: Action, names: _Names) -> str:
    """What happens, said of this state."""
    kind, *rest = action
    if kind == "slow":
        return f"early: {describe(fleet, state, tuple(rest), names)}"
    if kind in ("deliver", "repeat", "lose", "swap"):
        return _of_letter(fleet, state, kind, *rest, names=names)
    if kind in ("read", "tell", "stop"):
        return _of_read(fleet, state, kind, *rest)
    if kind in ("due", "hush"):
        return f"{fleet.names[rest[0]]} {_DEADLINES[rest[1]]}"
    if kind == "news":
        what, index, life = state.news[0]
        return f"discovery tells the router: {fleet.names[index]}-{life} is {what}"
    plain = {
        "tick": "time passes at the router: its next deadline fires",
        "pass": "time passes for everybody",
        "tail": "the router looks for what the last report said was sent",
        "death": "the router dies",
    }
    if kind in plain:
        return plain[kind]
    if kind == "cancel":
        return f"the client of choice {rest[0]} goes away"
    words = {
        "turn": "computes one step",
        "crash": "dies",
        "restart": "starts again, as a new incarnation",
        "pause": "freezes",
        "resume": "goes on; its clock has gone on meanwhile",
        "stranger": "runs a stranger's work in all blocks that it can get",
        "unlist": "is no longer listed",
    }
    return f"{fleet.names[rest[0]]} {words[kind]}"


def _of_letter(
    fleet: Fleet, state: State, kind: str, way: str, index: int, *, names: _Names
) -> str:
    incarnation, payload = getattr(state, way)[index][0]
    content = _content(payload, names)
    worker = fleet.names[index]
    if kind == "lose":
        return f"the bus loses {content} {'to' if way == 'down' else 'from'} {worker}"
    if kind == "swap":
        return f"two envelopes {'to' if way == 'down' else 'from'} {worker} change places"
    again = ", and will get it again" if kind == "repeat" else ""
    if way == "up":
        if not payload:
            return f"the bus tells the router that {incarnation} does not listen"
        return f"the router hears from {incarnation}: {content}{again}"
    if not fleet.reaches(state, index, incarnation):
        return f"{incarnation} is gone: nobody takes {content}"
    return f"{worker} takes {content}{again}"


def _content(payload: bytes, names: _Names) -> str:
    if not payload:
        return "nothing"
    messages: list[Any]
    try:
        messages = list(decode_out(payload).outs)
    except BadMessage:
        messages = list(decode_jobs(payload).jobs)
    return ", ".join(_message(message, names) for message in messages)


def _message(message: Any, names: _Names) -> str:
    name = type(message).__name__
    if isinstance(message, StepFrame):
        deltas = [f"{names.attempt(d.attempt)} output {d.index}" for d in message.deltas]
        return f"tokens ({', '.join(deltas)})"
    numbers = getattr(message, "attempts", None) or [getattr(message, "attempt", None)]
    about = ", ".join(names.attempt(number) for number in numbers if number is not None)
    code = f" {message.code}" if hasattr(message, "code") else ""
    return f"{name}{code} ({about})" if about else name


def _of_read(fleet: Fleet, state: State, kind: str, index: int, number: int) -> str:
    reader = fleet.names[index]
    read = fleet.processes.locals[state.workers[index]].view.reads[number]
    if kind == "tell":
        return f"{reader} learns that its read of {read.source} is over"
    if kind == "stop":
        return f"{reader}'s transport stops the read that was given up"
    if fleet.source(state, read.source) is None:
        return f"{reader} finds {read.source} gone"
    if read.remote >= 0:
        return f"{reader} reads block {read.remote} of {read.source}"
    words = fleet.processes.locals[state.workers[fleet.source(state, read.source) or 0]].view.words
    what = "0" if not words[read.lease_slot] else "a nonce"
    return f"{reader} reads the word in slot {read.lease_slot} of {read.source}: {what}"

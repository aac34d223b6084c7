"""What a client got of one choice, chunk by chunk, and in what two of them differ."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Said:
    text: str = ""
    finish: str = ""
    ids: list[int] = field(default_factory=list)
    """What a client does not see: the tokens behind the text."""
    logprobs: list[tuple[Any, ...]] = field(default_factory=list)
    """Of each token its name, its offset or bytes, its value, and the likeliest with theirs."""

    def hear(self, choice: dict[str, Any]) -> None:
        """One entry of `choices`, of a chunk or of an answer in a piece."""
        chat = choice.get("delta") or choice.get("message") or {}
        self.text += choice["text"] if "text" in choice else chat.get("content", "")
        assert not self.finish, "a chunk after the last"
        self.finish = choice["finish_reason"] or ""
        self.logprobs += _entries(choice.get("logprobs"))


def _entries(found: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    if found is None:
        return []
    if "content" in found:
        return [
            (
                *(one["token"], tuple(one["bytes"]), one["logprob"]),
                {other["token"]: other["logprob"] for other in one["top_logprobs"]},
            )
            for one in found["content"]
        ]
    names = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    return list(zip(*(found[name] for name in names), strict=True))


def differences(whole: Said, said: Said, *, tolerance: float) -> list[str]:
    """Of what a client sees; `tolerance` is for the values of log-probabilities."""
    found = [
        f"{name} {other!r}, not {one!r}"
        for name in ("text", "finish")
        if (one := getattr(whole, name)) != (other := getattr(said, name))
    ]
    if [entry[:2] for entry in whole.logprobs] != [entry[:2] for entry in said.logprobs]:
        return [*found, "log-probabilities of other tokens, or elsewhere"]
    distance = worst_distance(whole, said)
    if distance > tolerance:
        found.append(f"log-probabilities are off by {distance:g}")
    return found


def worst_distance(whole: Said, said: Said) -> float:
    """Between two log-probabilities of the same tokens, 0 if there are none."""
    pairs = zip(whole.logprobs, said.logprobs, strict=True)
    return max((_distance(one, other) for one, other in pairs), default=0.0)


def _distance(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """Between two entries of the same token. The likeliest are compared by rank: two that are
    equal but for noise may change places."""
    if one[2] is None or other[2] is None:
        return 0.0 if one[2] == other[2] else float("inf")
    mine, theirs = sorted((one[3] or {}).values()), sorted((other[3] or {}).values())
    if len(mine) != len(theirs):
        return float("inf")
    pairs = [(one[2], other[2]), *zip(mine, theirs, strict=True)]
    return max(abs(a - b) for a, b in pairs)

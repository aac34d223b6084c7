"""One choice while it runs: what the client asked, what it has got, and who listens.

The driver owns these; sinks turn what arrives into bytes. Nothing here decides.
"""

from array import array
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import Struct

from protocol.errors import ClientError
from protocol.jobs import Prompt
from protocol.out import Delta, TokenLogprob
from protocol.sampling import Sampling


class ChoiceSpec(Struct, frozen=True, gc=False):
    """A validated choice, ready to be scheduled."""

    choice: str
    index: int
    """`choices[i].index` in the answer."""
    model: str
    prompt: Prompt
    num_prompt_tokens: int
    sampling: Sampling
    model_digest: str = ""
    cache_salt: str = ""
    siblings: str = ""
    """The same for all choices of one request that have one prompt; empty if it is the only one."""
    scores_only: bool = False
    """The client wants no output: the one token that a worker cannot but make is not its own."""
    grammar_param: str = ""
    """The parameter that asked for the grammar: what a worker says against it is about that."""


class ChoiceSink(Protocol):
    """Who listens to a choice. Called on the loop, must not block."""

    def delta(self, choice: "Choice", delta: Delta) -> None:
        """New output; `delta.finish` is set on the last one."""

    def ended(self, choice: "Choice", error: ClientError | None) -> None:
        """The choice is over: after its last delta (None) or instead of it (why not)."""


@dataclass(slots=True, eq=False)
class Choice:
    spec: ChoiceSpec
    sink: ChoiceSink
    arrived_at: float
    output: "array[int]" = field(default_factory=lambda: array("I"))
    chars: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_at: float = 0.0
    """When the first token was handed to the sink; 0 before."""
    last_at: float = 0.0
    finish: str = ""
    role: str = ""
    """Role of the worker that streams it now, for metrics."""
    dispatched_at: float = 0.0
    """When its first job was sent; 0 before."""
    lent_at: float = 0.0
    """When the handle that it holds arrived; 0 while it holds none."""
    attempts: set[int] = field(default_factory=set)
    prompt_logprobs: list[TokenLogprob | None] | None = None

    max_tokens: int = field(init=False)
    """Output tokens it may have."""

    def __post_init__(self) -> None:
        self.max_tokens = self.spec.sampling.max_tokens

    @property
    def lacks_prompt(self) -> bool:
        """The prompt's log-probabilities were asked for and have not come."""
        return self.spec.sampling.prompt_logprobs >= 0 and self.prompt_logprobs is None

    @property
    def sampling(self) -> Sampling:
        """Of the next attempt, which is asked for nothing that is here already."""
        sampling = self.spec.sampling
        if self.prompt_logprobs is None:
            return sampling
        return msgspec.structs.replace(sampling, prompt_logprobs=-1)

    @property
    def num_shown(self) -> int:
        """Output tokens that are the client's."""
        return 0 if self.spec.scores_only else len(self.output)

    @property
    def id(self) -> str:
        return self.spec.choice

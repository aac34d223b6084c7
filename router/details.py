"""What some requests want beside their text: the prompt back, and every token's log-probability.

A request without either has no `Details`, and its tokens never come here. Pieces leave in the order
in which they are to be written: the prompt of a choice first, then what its deltas bring.

The prompt's log-probabilities are computed once for all choices of a prompt, with its first choice:
what the others bring before that waits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.errors import ClientError
from protocol.out import Delta, TokenLogprob
from router.answers import Kind
from router.choices import Choice, ChoiceSpec
from router.echo import Echo
from router.logprobs import ChatTokens, TextTokens, TokenList, TokenNames, TokenPlaces
from text.tokenizer import Tokenizer

MISSING: Final = "the worker's engine gives no log-probabilities"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asked for, the same for all its choices."""

    tokenizer: Tokenizer
    names: TokenNames
    with_logprobs: bool
    skip_special_tokens: bool
    echoes: Sequence[Echo] = ()
    """One for each prompt; empty if prompts are not given back."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something to be written of choice `index`."""

    index: int
    text: str
    finish: str = ""


class Details:
    """One request's. `n` choices have one prompt."""

    def __init__(self, kind: Kind, specs: Sequence[ChoiceSpec], n: int, wanted: Wanted) -> None:
        self._n = n
        self._parts = [
            _Part(spec, kind, wanted.echoes[i // n] if wanted.echoes else None, wanted)
            for i, spec in enumerate(specs)
        ]
        self._prompt_counts = wanted.with_logprobs and bool(wanted.echoes)
        self._prompts: dict[int, Sequence[TokenLogprob | None]] = {}
        """Of each prompt whose first choice has begun."""

    def pieces(self, choice: Choice, delta: Delta) -> Iterator[Piece]:
        """What can be written now, of this choice and of those that waited for it: to be taken to
        the end, each with its `logprobs` before the next one.

        Raises ClientError if what was asked for is not there.
        """
        index = choice.spec.index
        part = self._parts[index]
        part.check(delta)
        if part.is_open:
            yield part.output(delta)
            return
        part.held.append(delta)
        if not self._prompt_counts:
            yield from part.open(())
            return
        number, place = divmod(index, self._n)
        if place == 0:
            entries = choice.prompt_logprobs
            if entries is None or len(entries) != choice.spec.num_prompt_tokens:
                raise _missing()
            self._prompts[number] = entries
        prompt = self._prompts.get(number)
        if prompt is None:
            return
        first = index - place
        for one in self._parts[first : first + self._n]:
            if one.held:
                yield from one.open(prompt)

    def logprobs(self, index: int) -> bytes:
        """The `logprobs` object of a choice: all its tokens since the last time; may be empty."""
        tokens = self._parts[index].tokens
        return tokens.take() if tokens is not None else b""


class _Part:
    """One choice."""

    def __init__(self, spec: ChoiceSpec, kind: Kind, echo: Echo | None, wanted: Wanted) -> None:
        self._index = spec.index
        self._echo = echo
        self._scores_only = spec.scores_only
        self.is_open = False
        """Its prompt has been written."""
        self.held: list[Delta] = []
        self.tokens: TokenList | None = None
        if wanted.with_logprobs:
            self.tokens = _token_list(kind, echo, wanted)

    def open(self, prompt: Sequence[TokenLogprob | None]) -> Iterator[Piece]:
        """The prompt, and what was held."""
        self.is_open = True
        if self._echo is not None:
            if self.tokens is not None:
                self.tokens.add_prompt(self._echo.ids, prompt, self._echo.offsets)
            yield Piece(self._index, self._echo.text)
        held, self.held = self.held, []
        for delta in held:
            yield self.output(delta)

    def check(self, delta: Delta) -> None:
        """Raises ClientError unless every token has its entry; before anything is written."""
        if self.tokens is None or self._scores_only or not delta.ids:
            return
        if delta.logprobs is None or len(delta.logprobs) != len(delta.ids):
            raise _missing()

    def output(self, delta: Delta) -> Piece:
        """The next of the output. A choice that only scores its prompt shows no token."""
        if self._scores_only:
            return Piece(self._index, "", "length" if delta.finish else "")
        if self.tokens is not None and delta.logprobs:
            self.tokens.add(delta.ids, delta.logprobs)
        return Piece(self._index, delta.text, delta.finish)


def _token_list(kind: Kind, echo: Echo | None, wanted: Wanted) -> TokenList:
    if kind == "chat":
        return ChatTokens(wanted.names)
    places = TokenPlaces(
        wanted.tokenizer,
        skip_special_tokens=wanted.skip_special_tokens,
        begin=len(echo.text) if echo is not None else 0,
    )
    return TextTokens(wanted.names, places)


def _missing() -> ClientError:
    return ClientError(501, MISSING, code="logprobs_unavailable", param="logprobs")

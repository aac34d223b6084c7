"""The text of one choice: detokenizer and stop strings together, with resume.

The state is a pure function of the output ids and of how many characters were sent, so another
worker goes on in the middle of a character or of a stop string. It knows no end-of-text ids and no
token limits: those are the engine's.
"""

from collections.abc import Sequence

import msgspec

from text.detokenize import Detokenizer
from text.stops import StopMatcher
from text.tokenizer import Tokenizer


class ResumeError(ValueError):
    """More characters were sent than these ids can have released: they belong to another output."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one token added."""

    text: str
    """What may be sent now; may be empty."""
    stop: str | None = None
    """The stop string that ended the output. Later pieces are empty."""


class OutputText:
    """Turns output ids into what a client may see.

    Stop strings that are complete within the first `min_tokens` ids do not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops, include_stop=include_stop) if any(stops) else None
        self._min_tokens = min_tokens
        self.num_tokens = 0
        """Ids pushed so far."""
        self.chars_released = 0
        """Characters in all pieces so far: what another worker is told as `chars_sent`."""

    @property
    def stop(self) -> str | None:
        """The stop string that ended the output."""
        return self._matcher.matched if self._matcher else None

    def push(self, token_id: int) -> Piece:
        """What this id adds."""
        self.num_tokens += 1
        text = self._detokenizer.push_one(token_id)
        if self._matcher is not None:
            return self._release(text)
        self.chars_released += len(text)  # As `_release` does: once for every token.
        return Piece(text)

    def finish(self) -> Piece:
        """What was held, when no more ids come. Nothing after a stop string."""
        piece = self._release(self._detokenizer.finish())
        if self._matcher is None or piece.stop is not None:
            return piece
        rest = self._matcher.finish()
        self.chars_released += len(rest)
        return Piece(piece.text + rest)

    def resume(self, output_ids: Sequence[int], chars_sent: int) -> Piece:
        """Take over an output, on a fresh instance; the releasable text that was not sent yet.

        Errors: ResumeError if more characters were sent than `output_ids` release.
        """
        if self.num_tokens:
            raise ResumeError("resume needs a fresh instance")
        text = "".join([self.push(token_id).text for token_id in output_ids])
        if not 0 <= chars_sent <= len(text):
            raise ResumeError(
                f"{chars_sent} characters were sent, but the output ids release {len(text)}"
            )
        return Piece(text[chars_sent:], self.stop)

    def _release(self, text: str) -> Piece:
        if self._matcher is None:
            self.chars_released += len(text)
            return Piece(text)
        shown, stop = self._matcher.push(text, armed=self.num_tokens > self._min_tokens)
        self.chars_released += len(shown)
        return Piece(shown, stop)

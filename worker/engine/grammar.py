"""JSON schemas as masks over the vocabulary: which token may come next so that the output fits.

The only file that knows llguidance, which is loaded when an engine starts: a worker without it
serves everything else. Where a grammar stands is a function of schema and output ids, so another
worker takes it up anywhere. It knows no sequences, threads or logits.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from text.tokenizer import Tokenizer

MAX_SCHEMA_BYTES: Final = 256 * 1024
MAX_NUMBER: Final = (1 << 63) - 1024
"""Whole numbers from here on are -2^63 or 2^63 once they are floats."""
_MAX_COMPILED: Final = 64
_MAX_ERROR_CHARS: Final = 300
_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{0,32}"
"""Between any two tokens of JSON: room for a line break and its indent, but no room to stay in."""
_OPTIONS: Final[Any] = {"whitespace_pattern": _WHITESPACE, "lenient": False}
_MAX_LEXER_STATES: Final = 20_000
"""1 to 2 kB each: what one schema may cost in memory."""
_END_BYTES: Final = b"<|end of the grammar|>"


class GrammarError(Exception):
    """The schema cannot be obeyed, or the output does not fit it. The message is one line."""


class GrammarState:
    """Where one output stands in its grammar. Not for two threads at once."""

    def __init__(self, matcher: Any, end_id: int, eos_ids: frozenset[int]) -> None:
        """Errors: GrammarError."""
        self._matcher = matcher
        self._end_id = end_id
        self._eos_ids = eos_ids
        self.allowed = bytearray()
        """Bit `i % 8` of byte `i // 8` is set if token `i` may come next; ids beyond may not. The
        model's ends are among them exactly if the output may end here."""
        self.is_over = False
        """Nothing can follow: the output is whole."""
        self._look()

    def advance(self, token: int) -> None:
        """`token` is the next of the output. Errors: GrammarError if the grammar does not allow it,
        or cannot go on within its bounds of time and memory."""
        try:
            if not self._matcher.consume_token(token):
                raise GrammarError(_one_line(self._matcher.get_error()))
            self._look()
        except GrammarError:
            raise
        except BaseException as error:  # noqa: BLE001  a panic ends this output, not the engine
            raise GrammarError(f"the grammar broke: {type(error).__name__}") from None

    def _look(self) -> None:
        mask = bytearray(self._matcher.compute_bitmask())
        error = self._matcher.get_error()
        if error:
            raise GrammarError(_one_line(error))
        may_end = _has(mask, self._end_id)
        mask[self._end_id >> 3] &= ~(1 << (self._end_id & 7)) & 0xFF
        self.is_over = mask.count(0) == len(mask)
        if self.is_over and not may_end:
            raise GrammarError("nothing can follow this output, and it is not whole")
        if may_end:
            for eos_id in self._eos_ids:
                mask[eos_id >> 3] |= 1 << (eos_id & 7)
        self.allowed = mask


class GrammarCompiler:
    """Grammars for one model's vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, *, max_compiled: int = _MAX_COMPILED) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._max_compiled = max_compiled
        self.num_compiled = 0

    def prepare(self) -> str:
        """Build the library's tables of the vocabulary, before there is work: for 128 000 tokens
        it takes a second and does not let go of the GIL. Why there can be no grammar, or ""."""
        try:
            with self._lock:
                self._vocabulary = self._vocabulary or _vocabulary(self._tokenizer)
        except GrammarError as error:
            return str(error)
        return ""

    def state(
        self, schema: str, output_ids: Sequence[int] = (), *, ignore_eos: bool = False
    ) -> GrammarState:
        """Where `output_ids` stand in the grammar of `schema`, JSON text. Takes milliseconds, in
        bad cases some hundred. `ignore_eos`: the model's ends are never allowed.

        Errors: GrammarError.
        """
        matcher = self._matcher(schema).deep_copy()
        if output_ids and not matcher.consume_tokens(list(output_ids)):
            raise GrammarError(f"the output so far: {_one_line(matcher.get_error())}")
        eos_ids = frozenset() if ignore_eos else self._tokenizer.eos_ids
        known = frozenset(i for i in eos_ids if i < self._tokenizer.vocab_size)
        return GrammarState(matcher, self._tokenizer.vocab_size, known)

    def _matcher(self, schema: str) -> Any:
        """The compiled grammar before the first token: to be copied, never to be moved on."""
        with self._lock:
            if schema in self._compiled:
                self._compiled.move_to_end(schema)
                return self._compiled[schema]
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
        matcher = _compile(schema, self._vocabulary)
        with self._lock:
            self.num_compiled += 1
            self._compiled[schema] = matcher
            if len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        return matcher


def _compile(schema: str, vocabulary: Any) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    try:
        grammar = LLMatcher.grammar_from_json_schema(_checked(schema), overrides=_OPTIONS)
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    except ValueError as error:
        raise GrammarError(_one_line(str(error))) from None
    if matcher.is_error():
        raise GrammarError(_one_line(matcher.get_error()))
    return matcher


def _checked(schema: str) -> str:
    """The schema as an object without options of the library. Errors: GrammarError."""
    if len(schema) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schema has {len(schema)} characters; at most {MAX_SCHEMA_BYTES}")
    try:
        parsed = msgspec.json.decode(schema)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise GrammarError(f"the schema is not JSON: {_one_line(str(error))}") from None
    if parsed is True:
        parsed = {}
    if not isinstance(parsed, dict):
        raise GrammarError("the schema is not an object, or true")
    parsed.pop("x-guidance", None)
    if _has_number_beyond(parsed, MAX_NUMBER):
        raise GrammarError("the schema has a whole number of more than 63 bits")
    return msgspec.json.encode(parsed).decode()


def _has_number_beyond(schema: Any, most: int) -> bool:
    """Wherever it stands. The library ends the whole process at one that is -2^63 as a float."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, int) and not -most < value < most:
            return True
    return False


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The model's tokens for the library, and one more, which means that the grammar may end.

    The model's own ends may be several, none, or plain tokens for this request; they are no part
    of the library's world.
    """
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise GrammarError("this worker has no llguidance: it cannot obey a schema") from error

    try:
        wrapper = TokenizerWrapper(_Vocabulary(tokenizer))
        return LLTokenizer(wrapper, slices=LLTokenizer.json_slices())
    except (ValueError, RuntimeError, TypeError) as error:
        raise GrammarError(f"this vocabulary fits no grammar: {_one_line(str(error))}") from error


class _Vocabulary:
    """What the library asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        self.eos_token_id = size
        self.bos_token_id = None
        self.tokens = [*map(tokenizer.token_bytes, range(size)), _END_BYTES]
        self.special_token_ids = [*filter(tokenizer.is_special, range(size)), size]
        self._tokenizer = tokenizer
        self._greedy = _GreedyEncoder(tokenizer.token_bytes, size, tokenizer.is_special)

    def __call__(self, text: str) -> list[int]:
        """How the model would write this text, which the grammar demands.

        What the tokenizer reads as a special token, or begins with a space of its own, would not
        be this text: then whatever tokens make up its bytes.
        """
        if not isinstance(text, str):
            raise TypeError("text is a str")  # so that the library does not pass bytes
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        data = text.encode()
        if b"".join(map(self._tokenizer.token_bytes, ids)) == data and not any(
            map(self._tokenizer.is_special, ids)
        ):
            return ids
        return self._greedy.encode(data)


class _GreedyEncoder:
    """The longest token that fits, again and again."""

    def __init__(
        self, token_bytes: Callable[[int], bytes], size: int, is_special: Callable[[int], bool]
    ) -> None:
        self._ids: dict[bytes, int] = {}
        for token in range(size):
            if not is_special(token):
                self._ids.setdefault(token_bytes(token), token)
        self._longest = max(map(len, self._ids), default=0)

    def encode(self, data: bytes) -> list[int]:
        """Ids up to the first byte that no token begins with."""
        ids, at = [], 0
        while at < len(data):
            ends = range(min(at + self._longest, len(data)), at, -1)
            found = next((end for end in ends if data[at:end] in self._ids), None)
            if found is None:
                break
            ids.append(self._ids[data[at:found]])
            at = found
        return ids


def _has(mask: bytearray, token: int) -> bool:
    return bool(mask[token >> 3] >> (token & 7) & 1)


def _one_line(message: str) -> str:
    line = " ".join(message.split("\n<state>")[0].split())
    return line if len(line) <= _MAX_ERROR_CHARS else line[: _MAX_ERROR_CHARS - 3] + "..."

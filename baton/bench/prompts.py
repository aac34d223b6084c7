"""Prompts of known lengths, as the demo model counts tokens."""

from typing import Final

from baton.demo import demo_model_folder
from text.assets import load_assets
from text.tokenizer import Tokenizer

_WORDS: Final = "the quick brown fox jumps over the lazy dog "
PROMPTS: Final = ("short", "2k", "32kb", "8k")
"""18 words; 2 000 tokens; 32 KB of text; 8 000 tokens."""


def text_of(num_tokens: int) -> str:
    """So many tokens, as the demo model counts them."""
    tokenizer = Tokenizer.from_assets(load_assets(demo_model_folder()))
    per_repetition = len(tokenizer.encode(_WORDS * 100, add_special_tokens=False)) / 100
    return _WORDS * round(num_tokens / per_repetition)


def texts() -> dict[str, str]:
    """By name of the prompt."""
    in_bytes = _WORDS * (32_768 // len(_WORDS))
    return {"short": _WORDS * 2, "2k": text_of(2_000), "32kb": in_bytes, "8k": text_of(8_000)}

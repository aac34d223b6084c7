"""How the next token is chosen and when a choice ends: the same fields on every leg.

Everything here, with `prompt_ids`, `output_ids` and `chars_sent`, determines the rest of a choice:
no other state crosses a leg.
"""

import msgspec


class Sampling(msgspec.Struct, array_like=True, frozen=True):
    """Resolved options of one choice: nothing is left to a worker's default."""

    max_tokens: int
    """The output never has more tokens than this; the router has already bounded it."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int = 0
    """The random number of output `i` depends on (seed, i) alone."""
    stop: list[str] = []
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop: bool = False
    """Leave a matched stop string in the text."""
    skip_special_tokens: bool = True

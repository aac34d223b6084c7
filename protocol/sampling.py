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
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are not drawn; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids that are in prompt or output."""
    presence_penalty: float = 0.0
    """Taken from the logits of ids that are in the output."""
    frequency_penalty: float = 0.0
    """Taken from an id's logit once for each time it is in the output."""
    logit_bias: dict[int, float] = {}
    """Added to these ids' logits."""
    logprobs: int = -1
    """How many of the likeliest tokens are named beside each output token; 0: only the token's own
    log-probability; -1: nothing. Always of the model's own distribution, before what is above."""
    prompt_logprobs: int = -1
    """The same for the tokens of the prompt; costs the whole prompt, cached or not."""
    grammar: str = ""
    """JSON schema, as JSON text, that the whole output satisfies; empty: free text."""

"""How transformers goes on, greedily; prompts where two tokens are nearly tied are passed over."""

import random
from dataclasses import dataclass
from typing import Any

from baton.demo import demo_model_folder

MARGIN = 1e-3
"""Between the two best logits: vLLM's sums are in another order."""


@dataclass(frozen=True)
class Case:
    """A prompt, and how transformers goes on, past any end, without a near tie."""

    ids: list[int]
    out: list[int]


class Reference:
    """The demo model in float32."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32)

    def greedy(self, ids: list[int], num_tokens: int) -> tuple[list[int], float]:
        """The tokens, and the smallest gap between the two best logits on the way."""
        torch = self._torch
        out: list[int] = []
        smallest = float("inf")
        past: Any = None
        feed = torch.tensor([ids])
        with torch.inference_mode():
            for _ in range(num_tokens):
                answer = self._model(feed, past_key_values=past, use_cache=True)
                past = answer.past_key_values
                best = answer.logits[0, -1].topk(2)
                smallest = min(smallest, float(best.values[0] - best.values[1]))
                out.append(int(best.indices[0]))
                feed = torch.tensor([[out[-1]]])
        return out, smallest

    def draw(self, corpus: list[int], lengths: list[int], num_tokens: int) -> list[Case]:
        rng = random.Random(7)
        found = []
        for length in lengths:
            while True:
                start = rng.randrange(len(corpus) - length)
                ids = corpus[start : start + length]
                out, margin = self.greedy(ids, num_tokens)
                if margin >= MARGIN:
                    found.append(Case(ids, out))
                    break
        return found

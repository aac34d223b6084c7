"""Tiny models of every family, and what must hold of each on any device, against `transformers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protocol.ids import JobKey
from tests.unit.worker.engine_world import new_key
from tests.unit.worker.tiny_llama import (
    BLOCK,
    NULL,
    TorchWorld,
    bench_of,
    prompt_of,
    reference,
    running,
    sampling_of,
)
from worker.engine.base import DecodeJob

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"rope_theta": 5e4, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama3_new_spelling": {
        "rope_theta": None,
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e4},
    },
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "mistral": {**MISTRAL, "sliding_window": 11},
    "mistral_without_window": {**MISTRAL, "sliding_window": NULL, "head_dim": 12},
    "qwen2": {**QWEN2, "sliding_window": 11, "use_sliding_window": False},
    "qwen2_last_layers_slide": {
        **QWEN2,
        "sliding_window": 13,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen2_yarn": {
        **QWEN2,
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
        "tie_word_embeddings": True,
    },
    "qwen3": {**QWEN3, "head_dim": 16},
    "qwen3_named_layers_slide": {
        **QWEN3,
        "head_dim": 6,
        "attention_bias": True,
        "sliding_window": 9,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
"""Changes of the base config."""

NUM_TOKENS = 14
LENGTHS = [1, BLOCK, BLOCK + 1, 20, 3 * BLOCK, 60]
"""Of prompts: shorter and longer than the windows, and answers go beyond them."""


class Spread(NamedTuple):
    """How far apart some logits are."""

    largest: float
    mean: float


def spread(ours: Tensor, theirs: Tensor) -> Spread:
    assert ours.shape == theirs.shape
    apart = (ours - theirs).abs()
    return Spread(float(apart.max()), float(apart.mean()))


def check_logits(folder: Path, tolerance: float, **settings: Any) -> None:
    """In float32, in one chunk and across chunk and block borders."""
    ids = prompt_of(7 * BLOCK + 5)
    theirs = reference(folder).logits(ids)
    assert theirs.std() > 1
    with bench_of(folder, dtype="float32", **settings) as bench:
        for sizes in ((100,), (11, 1), (BLOCK, BLOCK + 1, 3), (1,)):
            ours = bench.in_chunks([3, 0, 7, 1, 11, 5, 30, 2], ids, *sizes)
            assert spread(ours, theirs).largest < tolerance


def check_half(folder: Path, dtype: torch.dtype, **settings: Any) -> None:
    """As near to float32 as `transformers` comes in the same type, and as near to it as its own
    two ways of attention are to each other. The mean says it better than the worst of thousands."""
    ids = prompt_of(7 * BLOCK + 5)
    exact = reference(folder).logits(ids)
    theirs = [reference(folder, dtype, way).logits(ids) for way in ("eager", "sdpa")]
    their_errors = [spread(logits, exact) for logits in theirs]
    own_spread = spread(*theirs)
    assert own_spread.mean > 0
    with bench_of(folder, dtype=str(dtype).removeprefix("torch."), **settings) as bench:
        for sizes in ((100,), (13, 1)):
            ours = bench.in_chunks([3, 0, 7, 1, 11, 5, 30, 2], ids, *sizes)
            error = spread(ours, exact)
            assert error.mean < 1.3 * max(their.mean for their in their_errors)
            assert error.largest < 2 * max(their.largest for their in their_errors)
            assert min(spread(ours, logits).mean for logits in theirs) < 1.3 * own_spread.mean


async def check_engine(folder: Path, **settings: Any) -> None:
    """Greedy answers of a whole engine: chunks of prompts, hits of the prefix cache, preemption."""
    dtype = getattr(torch, settings.get("dtype", "float32"))
    prompts = [prompt_of(length, salt=4) for length in LENGTHS]
    async with running(folder, num_blocks=120, max_step_tokens=17, **settings) as world:
        first = await answers(world, prompts)
        assert world.stepper.stats().cached_tokens == 0
        again = await answers(world, prompts)
        assert world.stepper.stats().cached_tokens >= 2 * BLOCK
    async with running(folder, num_blocks=14, max_step_tokens=40, **settings) as world:
        preempted = await answers(world, prompts)
        assert world.stepper.stats().preemptions > 0
    decided = 0
    for found in (first, again, preempted):
        for prompt, answer in zip(prompts, found, strict=True):
            decided += check_greedy(folder, dtype, prompt, answer)
    assert decided > NUM_TOKENS * len(prompts)


def check_greedy(
    folder: Path, dtype: torch.dtype, prompt: Sequence[int], answer: Sequence[int]
) -> int:
    """Each token is the reference's choice after those before it, unless its two best ones are
    nearer to each other than its numbers are sure. Returns how many were decided."""
    assert len(answer) == NUM_TOKENS
    ids = [*prompt, *answer[:-1]]
    logits = reference(folder, dtype).logits(ids)
    doubt = 1e-3
    if dtype != torch.float32:
        doubt = 2 * spread(logits, reference(folder, dtype, "sdpa").logits(ids)).largest
    best = logits[len(prompt) - 1 :].topk(2)
    decided = (best.values[:, 0] - best.values[:, 1]) > doubt
    expected = best.indices[:, 0]
    assert bool((torch.tensor(list(answer)) == expected)[decided].all())
    return int(decided.sum())


async def answers(world: TorchWorld, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of all prompts at once."""
    keys: list[JobKey] = []
    for prompt in prompts:
        keys.append(new_key())
        world.stepper.submit(DecodeJob(keys[-1], "choice/0", prompt, sampling_of(NUM_TOKENS)))
    found = []
    for key in keys:
        attempt = await world.recorder.over(key)
        assert (attempt.failed, attempt.finish) == (None, "length")
        found.append(attempt.ids)
    return found

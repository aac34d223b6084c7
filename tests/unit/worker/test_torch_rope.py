"""Rotary embeddings against `transformers`, at the sizes of real models, and what is refused."""

from typing import Any

import pytest
import torch

from protocol.errors import ConfigError
from worker.engine.torch_rope import (
    LinearRope,
    Llama3Rope,
    PlainRope,
    YarnRope,
    read_rope,
    rotary_tables,
)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 1e6},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama 3.1": {
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
    },
    "llama 3.2": {
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama3 trained for all positions": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "yarn of qwen": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, new spelling": {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e6}},
    "yarn with turns": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.5}},
    "yarn with equal turns": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 4}},
    "yarn, not whole": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn with a factor of attention": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn with scales": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}},
    "yarn with one scale": {"rope_scaling": {**YARN, "mscale": 0.707}},
    "yarn that is none": {"rope_scaling": {**YARN, "factor": 1.0}},
    "yarn over more positions than turns": {"rope_theta": 500.0, "rope_scaling": YARN},
    "yarn over far more positions than turns": {"rope_theta": 10.0, "rope_scaling": YARN},
    "yarn of few positions": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 20, "factor": 2.0}
    },
    "trained positions beside it": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [128, 64, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = 131_072
    theirs: Any = LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=head_dim, max_position_embeddings=positions,
            **{key: dict(v) if isinstance(v, dict) else v for key, v in KINDS[kind].items()},
        )
    )  # fmt: skip
    rope = read_rope(KINDS[kind], positions)
    assert rope.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert torch.allclose(rope.frequencies(head_dim), theirs.inv_freq, rtol=1e-6, atol=0)
    cos, sin = rotary_tables(rope, head_dim, 200, torch.float32, torch.device("cpu"))
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(200).unsqueeze(0))
    assert torch.allclose(cos, their_cos[0], atol=1e-4)
    half = head_dim // 2
    assert torch.allclose(
        torch.cat([-sin[:, :half], sin[:, half:]], dim=-1), their_sin[0], atol=1e-4
    )


def test_both_spellings_are_one() -> None:
    assert read_rope({}, 100) == PlainRope(10_000.0)
    assert read_rope({"rope_scaling": {"type": "linear", "factor": 2}}, 100) == LinearRope(1e4, 2.0)
    old = read_rope({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 100)
    new = read_rope({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 100)
    assert old == new == Llama3Rope(5e5, 8.0, 1.0, 4.0, 100)
    both = {"rope_scaling": {"type": "linear", "factor": 2}}
    assert read_rope({**both, "rope_parameters": both["rope_scaling"]}, 9) == LinearRope(1e4, 2.0)


def test_yarn_as_published() -> None:
    rope = read_rope({"rope_theta": 1e6, "rope_scaling": YARN}, 131_072)
    assert isinstance(rope, YarnRope)
    assert (rope.slow_turns, rope.fast_turns, rope.whole_dimensions) == (1.0, 32.0, True)
    assert rope.magnitude == pytest.approx(1.13862943611)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope scaling ['yarn']"),
        ({"rope_scaling": 2}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be float"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "high_freq_factor 4.0 must be above low_freq_factor 4.0",
        ),
        ({"rope_scaling": {**YARN, "beta_slow": 64}}, "beta_fast 32.0 must not be below"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor must be above 0"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate must be bool"),
        ({"rope_scaling": {**YARN, "mrope_section": [1]}}, "'yarn' with mrope_section"),
        ({"rope_theta": 0}, "rope_theta must be above 0"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta must be above 1 for yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_scaling": YARN, "rope_parameters": LLAMA3},
            "rope_scaling and rope_parameters say different things",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "'default' with full_attention",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_rope(config, 1024)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)

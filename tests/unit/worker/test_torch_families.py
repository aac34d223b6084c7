"""Every family against `transformers`, and which configs are which family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import ConfigError
from tests.unit.worker.model_families import (
    FAMILIES,
    LLAMA3_ROPE,
    MISTRAL,
    QWEN2,
    QWEN3,
    check_engine,
    check_half,
    check_logits,
)
from tests.unit.worker.tiny_llama import BASE, NULL, Bench, bench_of, make_model
from worker.engine.torch_config import LlamaConfig, read_llama_config

TOLERANCE = 1e-4
HALVES = {"llama3": torch.bfloat16, "mistral": torch.float16, "qwen2_yarn": torch.float16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_model(root / name, **changes) for name, changes in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    check_logits(folders[family], TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_as_near_as_those_of_transformers(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    check_half(folders[family], dtype)


@pytest.mark.parametrize("family", FAMILIES)
async def test_answers_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    await check_engine(folders[family])


@pytest.mark.parametrize("family", HALVES)
async def test_answers_in_halves_are_those_of_transformers(
    folders: dict[str, Path], family: str
) -> None:
    await check_engine(folders[family], dtype=str(HALVES[family]).removeprefix("torch."))


# configs


def read(**changes: Any) -> LlamaConfig:
    config = {
        key: None if value is NULL else value
        for key, value in {**BASE, **changes}.items()
        if value is not None
    }
    return read_llama_config(config, "config.json")


def test_the_model_type_says_the_family_where_no_architecture_is_named() -> None:
    for named in (MISTRAL, QWEN2, QWEN3):
        unnamed = {**named, "architectures": None, "head_dim": 8}
        assert read(**unnamed) == read(**named, head_dim=8)
        assert read(**{**named, "model_type": None}, head_dim=8) == read(**named, head_dim=8)


def test_what_a_config_does_not_say_is_what_transformers_takes() -> None:
    silent: dict[str, Any] = {"num_key_value_heads": None, "max_position_embeddings": None}
    wide = {"hidden_size": 512, "num_attention_heads": 32, "num_hidden_layers": 2}
    llama = read(**silent, **wide)
    assert (llama.num_kv_heads, llama.head_dim, llama.max_positions) == (32, 16, 2048)
    mistral = read(**MISTRAL, **silent, **wide)
    assert (mistral.num_kv_heads, mistral.head_dim, mistral.max_positions) == (8, 16, 131_072)
    assert mistral.windows == (4096, 4096)
    qwen2 = read(**QWEN2, **silent, **wide)
    assert (qwen2.num_kv_heads, qwen2.head_dim, qwen2.max_positions) == (32, 16, 32_768)
    assert qwen2.windows == (None, None)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(**QWEN3, **silent, **wide)
    assert (qwen3.num_kv_heads, qwen3.head_dim) == (32, 128)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    assert read(**MISTRAL, num_key_value_heads=NULL).num_kv_heads == BASE["num_attention_heads"]


def test_the_layers_that_slide() -> None:
    slides = {"use_sliding_window": True, "sliding_window": 5}
    assert read(**QWEN2, **slides).windows == (None, None, None)
    assert read(**QWEN2, **slides, max_window_layers=2).windows == (None, None, 5)
    assert read(**QWEN2, **slides, max_window_layers=0).windows == (5, 5, 5)
    assert read(**QWEN2, use_sliding_window=True, max_window_layers=0).windows == (4096,) * 3
    assert read(**MISTRAL, sliding_window=NULL).windows == (None, None, None)
    assert read(sliding_window=7).windows == (None, None, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(**QWEN3, **slides, layer_types=kinds).windows == (5, None, 5)
    assert read(**MISTRAL, sliding_window=5, layer_types=["sliding_attention"] * 3).windows == (
        (5,) * 3
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**QWEN2, "model_type": "llama"}, "model_type 'llama' is not that of Qwen2ForCausalLM"),
        ({"architectures": ["A", "B"]}, "architecture A, B is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architecture llama is not supported"),
        ({"architectures": [["x"]]}, "is not supported, only LlamaForCausalLM, MistralForCausalLM"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window must be above 0"),
        ({**MISTRAL, "sliding_window": "4096"}, "sliding_window must be int"),
        (
            {**MISTRAL, "sliding_window": 5, "layer_types": ["full_attention"] * 3},
            "layer_types of a Mistral model",
        ),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types must be a list of 3 names"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention'"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
        ({**QWEN2, "use_sliding_window": 1}, "use_sliding_window must be bool"),
        ({"head_dim": 0}, "head_dim must be above 0"),
        ({"hidden_size": 2}, "head_dim must be above 0"),
    ],
)
def test_a_config_of_no_family_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(**changes)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


# what the digest says

SAME_TENSORS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other norm": {"rms_norm_eps": 1e-6},
    "other theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "more linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3_ROPE},
    "llama3 of more": {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 32}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn of fewer positions": {
        "rope_scaling": {"type": "yarn", "factor": 2.0},
        "max_position_embeddings": 512,
    },
    "yarn, sharper": {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
    "yarn, not whole": {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
    "yarn, faster": {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}},
    "mistral": {**MISTRAL, "sliding_window": 5},
    "mistral that looks back further": {**MISTRAL, "sliding_window": 6},
    "fewer, wider heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip


def test_the_digest_changes_whenever_numbers_would(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    digests = {}
    for name, changes in SAME_TENSORS.items():
        (folder / "config.json").write_text(json.dumps({**BASE, **changes}))
        bench = Bench(folder)
        digests[name] = bench.runner.model_digest
        bench.arena.close()
    assert len(set(digests.values())) == len(SAME_TENSORS)


def test_another_spelling_is_the_same_model(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    digests = set()
    for changes in (
        {"rope_theta": 5e4, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e4}},
        {"rope_theta": 5e4, "rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 512},
        {"rope_theta": 5e4, "rope_scaling": LLAMA3_ROPE, "torch_dtype": "bfloat16"},
    ):
        (folder / "config.json").write_text(json.dumps({**BASE, **changes}))
        with bench_of(folder) as bench:
            digests.add(bench.runner.model_digest)
    assert len(digests) == 1

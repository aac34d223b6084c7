import json
from pathlib import Path

import pytest
import torch

from protocol.errors import ConfigError
from tests.unit.worker.tiny_llama import BASE, Bench, bench_of, make_model, save, tensors_of
from worker.engine import torch_weights
from worker.engine.torch_weights import open_weights, weights_digest

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        Bench(folder)
    line = str(raised.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_tensors_are_copies_in_the_type_asked_for(folder: Path) -> None:
    stored = tensors_of(BASE)["model.norm.weight"]
    with open_weights(folder) as weights:
        read = weights.read("model.norm.weight", torch.float32)
        half = weights.read("model.norm.weight", torch.bfloat16)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(read, stored)
    assert torch.equal(half, stored.to(torch.bfloat16))


def test_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} cannot be read" in refused(folder)


def test_damaged_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:20] = b"x" * 12
    path.write_bytes(content)
    assert "cannot be read" in refused(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = tensors_of(BASE)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    save(folder, tensors)
    line = refused(folder)
    assert line.endswith("has no tensor model.layers.1.mlp.up_proj.weight and 1 more")


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    tensors = tensors_of(BASE)
    del tensors["lm_head.weight"]
    save(folder, tensors)
    assert "has no tensor lm_head.weight" in refused(folder)


def test_tensors_that_the_config_does_not_know_are_refused(folder: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save(folder, tensors_of(BASE) | bias)
    assert "has an unexpected tensor model.layers.0.self_attn.q_proj.bias" in refused(folder)


def test_what_old_files_carry_along_is_ignored(tmp_path: Path) -> None:
    tied = make_model(tmp_path, tie_word_embeddings=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "lm_head.weight": torch.zeros(320, 32),
    }
    save(tied, tensors_of({**BASE, "tie_word_embeddings": True}) | extra)
    with bench_of(tied) as bench:
        assert bench.runner.vocab_size == 320


def test_wrong_shape(folder: Path) -> None:
    save(folder, tensors_of(BASE) | {"model.norm.weight": torch.ones(31)})
    line = refused(folder)
    assert "model.norm.weight has the shape [31], config.json asks for [32]" in line


def test_numbers_that_are_no_floats(folder: Path) -> None:
    save(folder, tensors_of(BASE) | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    assert "model.norm.weight is stored as I8" in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged"),
        ("{}", "is damaged"),
        ('{"weight_map": 3}', "is damaged"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not a file of the folder"),
        ('{"weight_map": {"a": "model.safetensors"}}', "its file lacks, a"),
    ],
)
def test_an_index_that_lies(folder: Path, content: str, said: str) -> None:
    (folder / INDEX).write_text(content)
    assert said in refused(folder)


def test_a_shard_is_missing(tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors, which is not a file" in refused(folder)


def test_a_tensor_counts_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_files=2)
    index = json.loads((folder / INDEX).read_text())
    name = "model.norm.weight"
    owner = index["weight_map"][name]
    other = next(file for file in set(index["weight_map"].values()) if file != owner)
    both = {n: t for n, t in tensors_of(BASE).items() if index["weight_map"][n] == other}
    from safetensors.torch import save_file

    save_file(both | {name: torch.zeros(32)}, folder / other)
    with open_weights(folder) as weights:
        assert torch.equal(weights.read(name, torch.float32), tensors_of(BASE)[name])


def test_digest_tells_models_apart(folder: Path, tmp_path: Path) -> None:
    facts = {"dtype": "float32"}
    digests = [
        weights_digest(folder, facts),
        weights_digest(folder, {"dtype": "bfloat16"}),
        weights_digest(make_model(tmp_path / "other", seed=1), facts),
        weights_digest(make_model(tmp_path / "half", dtype=torch.bfloat16), facts),
    ]
    assert len(set(digests)) == len(digests)
    assert weights_digest(make_model(tmp_path / "same"), facts) == digests[0]


def test_digest_of_a_large_file_sees_its_size_and_its_pieces(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_weights, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(torch_weights, "_PIECE_BYTES", 64)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    first = weights_digest(folder, {})
    for altered in (
        content + b"\0",
        b"x" + content[1:],
        content[:-1] + bytes([content[-1] ^ 1]),
        bytes(len(content)),
    ):
        path.write_bytes(altered)
        assert weights_digest(folder, {}) != first
    path.write_bytes(content)
    assert weights_digest(folder, {}) == first

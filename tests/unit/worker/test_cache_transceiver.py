"""TensorRT-LLM's names in a worker's file and environment: what each means, and what is refused."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.settings import add_flags, load_settings
from protocol.errors import ConfigError
from worker.config import WorkerConfig
from worker.transfer.cache_transceiver import MEANINGLESS, read_environment, read_section
from worker.trtllm_config import EQUAL, KNOWN, TrtllmKeys


class Loaded:
    """A worker's configuration, and what is said about the rest."""

    def __init__(
        self, folder: Path, file: object, environ: dict[str, str] | None = None, *flags: str
    ) -> None:
        path = folder / "worker.yaml"
        path.write_text(yaml.safe_dump(file))
        parser = argparse.ArgumentParser()
        add_flags(parser, WorkerConfig)
        args = parser.parse_args([*flags, f"--config={path}"])
        keys = TrtllmKeys(WorkerConfig.__struct_fields__)
        self.config = load_settings(WorkerConfig, args, environ or {}, keys)
        self.notes = keys.notes


def section(**values: Any) -> dict[str, Any]:
    return {"cache_transceiver_config": values}


@pytest.mark.parametrize(
    ("backend", "transfer"),
    [
        ("DEFAULT", "nixl"),
        ("NIXL", "nixl"),
        ("UCX", "ucx"),
        ("SHM", "shm"),
        ("TCP", "tcp"),
        ("nixl", "nixl"),
        (None, "auto"),
    ],
)
def test_backend_is_the_transfer(tmp_path: Path, backend: str | None, transfer: str) -> None:
    assert Loaded(tmp_path, section(backend=backend)).config.transfer == transfer


@pytest.mark.parametrize("backend", ["MPI", "MOONCAKE", "mpi"])
def test_backends_of_tensorrt_llm_that_are_not_here_are_refused_by_name(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"backend: {backend.upper()} is not supported here"):
        read_section({"backend": backend}, {})


def test_the_whole_section(tmp_path: Path) -> None:
    loaded = Loaded(
        tmp_path,
        section(
            backend="UCX",
            max_tokens_in_buffer=2048,
            kv_transfer_timeout_ms=1_500,
            kv_transfer_sender_future_timeout_ms=1_000,
            transceiver_runtime="PYTHON",
            kv_transfer_poll_interval_ms=5,
            kv_cache_bounce_size_mb=0,
            enable_pipelined_transfer=True,
        ),
    )
    config = loaded.config
    assert (config.transfer, config.max_tokens_in_buffer) == ("ucx", 2048)
    assert config.kv_transfer_timeout_ms == 1_500
    assert loaded.notes == [
        "cache_transceiver_config: without effect here: enable_pipelined_transfer, "
        "kv_cache_bounce_size_mb, kv_transfer_poll_interval_ms, "
        "kv_transfer_sender_future_timeout_ms, transceiver_runtime"
    ]


@pytest.mark.parametrize("value", [None, 0])
def test_no_buffer_is_no_bound(tmp_path: Path, value: int | None) -> None:
    assert Loaded(tmp_path, section(max_tokens_in_buffer=value)).config.max_tokens_in_buffer is None


def test_no_timeout_keeps_ours_and_says_so(tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, section(kv_transfer_timeout_ms=None))
    assert loaded.config.kv_transfer_timeout_ms == 60_000
    assert "no pull is endless" in loaded.notes[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_token_in_buffer": 1}, "unknown key `max_token_in_buffer`; did you mean `max_tokens"),
        ({"backend": "NIXLE"}, "backend: unknown backend 'NIXLE'; did you mean `NIXL`?"),
        ({"backend": 3}, "backend: expected a name, got 3"),
        ({"max_tokens_in_buffer": -1}, "max_tokens_in_buffer must be 0 to"),
        ({"max_tokens_in_buffer": True}, "max_tokens_in_buffer: expected a whole number, got True"),
        ({"kv_transfer_timeout_ms": 0}, "kv_transfer_timeout_ms must be 1 to"),
        ({"kv_transfer_timeout_ms": "1s"}, "kv_transfer_timeout_ms: expected a whole number"),
        ({"kv_transfer_sender_future_timeout_ms": 0}, "sender_future_timeout_ms must be 1 to"),
        ({"kv_transfer_poll_interval_ms": 0.5}, "poll_interval_ms: expected a whole number"),
        ({"kv_cache_bounce_size_mb": -1}, "kv_cache_bounce_size_mb must be 0 to"),
        ({"enable_pipelined_transfer": 1}, "enable_pipelined_transfer: expected true or false"),
        ({"transceiver_runtime": "RUST"}, "transceiver_runtime: expected CPP, PYTHON or auto"),
        ([1], "cache_transceiver_config must be a mapping"),
        ("NIXL", "cache_transceiver_config must be a mapping"),
        ({7: 1}, "unknown key `7`"),
    ],
)
def test_a_wrong_section_is_one_line(given: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_section(given, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("switch", "transfer"),
    [("TRTLLM_USE_NIXL_KVCACHE", "nixl"), ("TRTLLM_USE_UCX_KVCACHE", "ucx")],
)
@pytest.mark.parametrize("file", [{}, section(backend="DEFAULT"), section(max_tokens_in_buffer=9)])
def test_a_switch_chooses_where_the_file_does_not(
    tmp_path: Path, switch: str, transfer: str, file: dict[str, Any]
) -> None:
    assert Loaded(tmp_path, file, {switch: "1"}).config.transfer == transfer
    expected = "nixl" if file.get("cache_transceiver_config", {}).get("backend") else "auto"
    assert Loaded(tmp_path, file, {switch: "0"}).config.transfer == expected


@pytest.mark.parametrize(
    ("switch", "name"),
    [("TRTLLM_USE_MPI_KVCACHE", "MPI"), ("TRTLLM_USE_MOONCAKE_KVCACHE", "MOONCAKE")],
)
def test_a_switch_to_what_is_not_here_is_refused(switch: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{switch}: {name} is not supported here"):
        read_section(None, {switch: "1"})


def test_two_switches_contradict_each_other() -> None:
    environ = {"TRTLLM_USE_NIXL_KVCACHE": "1", "TRTLLM_USE_UCX_KVCACHE": "1"}
    with pytest.raises(ConfigError, match="NIXL_KVCACHE and TRTLLM_USE_UCX_KVCACHE are both 1"):
        read_section({"backend": "DEFAULT"}, environ)


def test_a_switch_says_less_than_the_file(tmp_path: Path) -> None:
    environ = {"TRTLLM_USE_UCX_KVCACHE": "1"}
    loaded = Loaded(tmp_path, section(backend="SHM"), environ)
    assert loaded.config.transfer == "shm"
    assert "TRTLLM_USE_UCX_KVCACHE is not looked at" in loaded.notes[0]
    assert Loaded(tmp_path, {"transfer": "tcp"}, environ).config.transfer == "tcp"


@pytest.mark.parametrize(
    ("value", "backend"), [("UCX", "UCX"), ("LIBFABRIC", "LIBFABRIC"), ("libfabric", "LIBFABRIC")]
)
def test_the_nixl_backend_is_taken_from_its_variable(
    tmp_path: Path, value: str, backend: str
) -> None:
    loaded = Loaded(tmp_path, {}, {"TRTLLM_NIXL_KVCACHE_BACKEND": value})
    assert (loaded.config.nixl_backend, loaded.notes) == (backend, [])


def test_an_unknown_nixl_backend_is_ucx_and_is_said(tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, {}, {"TRTLLM_NIXL_KVCACHE_BACKEND": "Mooncake"})
    assert loaded.config.nixl_backend == "UCX"
    assert loaded.notes == ["TRTLLM_NIXL_KVCACHE_BACKEND=Mooncake is not known: UCX is used"]


@pytest.mark.parametrize("name", ["NIXL_PLUGINS_DIR", "NIXL_PLUGIN_DIR"])
def test_both_spellings_of_the_plugin_folder_count(tmp_path: Path, name: str) -> None:
    assert Loaded(tmp_path, {}, {name: "/plugins"}).config.nixl_plugin_dir == "/plugins"
    ours = Loaded(tmp_path, {"nixl_plugin_dir": "/ours"}, {name: "/plugins"})
    assert ours.config.nixl_plugin_dir == "/ours"


@pytest.mark.parametrize("name", MEANINGLESS)
def test_variables_without_a_meaning_here_are_named(name: str) -> None:
    assert read_environment({name: "1"}).notes == [f"variables without effect here: {name}"]
    assert read_environment({"HOME": "/"}).notes == []


def test_keys_of_tensorrt_llm_that_do_nothing_here_are_named_in_one_line(tmp_path: Path) -> None:
    loaded = Loaded(
        tmp_path,
        {
            "tensor_parallel_size": 2,
            "pytorch_config": {"use_cuda_graph": True},
            "kv_cache_config": {"free_gpu_memory_fraction": 0.5},
            "max_batch_size": 8,
            "max_num_tokens": 4_096,
            "max_seq_len": 2_048,
            "lease_ms": 9,
        },
    )
    config = loaded.config
    assert (config.max_running, config.max_step_tokens, config.max_context) == (8, 4_096, 2_048)
    assert config.lease_ms == 9
    assert len(loaded.notes) == 1
    assert loaded.notes[0].endswith(
        "without effect here: kv_cache_config, pytorch_config, tensor_parallel_size"
    )


def test_beside_the_section_keys_of_other_versions_are_named_too(tmp_path: Path) -> None:
    loaded = Loaded(tmp_path, {"a_key_of_next_year": {"x": 1}, **section(backend="NIXL")})
    assert loaded.config.transfer == "nixl"
    assert loaded.notes[-1].endswith("without effect here: a_key_of_next_year")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"leese_ms": 9, **section(backend="NIXL")}, "unknown key `leese_ms`; did you mean"),
        ({"tensor_paralel_size": 2}, "unknown key `tensor_paralel_size`; did you mean `tensor_pa"),
        ({"cache_transciever_config": {}}, "did you mean `cache_transceiver_config`?"),
        ({"max_batch_size": "many"}, "max_batch_size: expected a whole number, got 'many'"),
        (
            {"transfer": "shm", **section(backend="NIXL")},
            "`transfer: shm` contradicts cache_transceiver_config, which asks for nixl",
        ),
        ({"max_running": 4, "max_batch_size": 8}, "`max_running: 4` contradicts `max_batch_size:"),
        ({"max_tokens_in_buffer": 0}, "max_tokens_in_buffer must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, file: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Loaded(tmp_path, file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_thing_said_twice_is_no_contradiction(tmp_path: Path) -> None:
    file = {"transfer": "nixl", **section(backend="DEFAULT")}
    assert Loaded(tmp_path, file).config.transfer == "nixl"


def test_batons_variables_and_flags_win_over_the_section(tmp_path: Path) -> None:
    file = section(backend="UCX")
    assert Loaded(tmp_path, file, {"BATON_TRANSFER": "tcp"}).config.transfer == "tcp"
    assert Loaded(tmp_path, file, {}, "--transfer=shm").config.transfer == "shm"


def test_no_name_is_both_ours_and_another_programs() -> None:
    """What is ours is always taken as ours."""
    assert not EQUAL.keys() & set(WorkerConfig.__struct_fields__)
    assert not KNOWN & set(WorkerConfig.__struct_fields__)
    assert not EQUAL.keys() & KNOWN
    assert set(EQUAL.values()) <= set(WorkerConfig.__struct_fields__)

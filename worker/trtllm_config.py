"""A worker's configuration file may be TensorRT-LLM's: what of it counts here, and what does not.

Baton's own names are taken as they are. `cache_transceiver_config` and a few keys with an equal
meaning become Baton's settings; the other keys TensorRT-LLM knows are named, once, and change
nothing. Its keys change with every version: in a file with `cache_transceiver_config` a key that is
in neither list is taken for one of those, unless it looks like a misspelt setting of ours. Such a
key, and unknown ones of other files, stay in, for the loader to refuse. One file that says two
things about one setting is an error; variables and flags of Baton win over the file, as always.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Final

from protocol.errors import ConfigError
from worker.transfer.cache_transceiver import SECTION, read_environment, read_section

EQUAL: Final = {
    "max_batch_size": "max_running",
    "max_num_tokens": "max_step_tokens",
    "max_seq_len": "max_context",
}
"""Sequences in one step, tokens in one step, tokens of one sequence: the same in both."""

_LISTED: Final = """
allreduce_strategy attention_dp_config attn_backend auto_parallel autotuner_enabled backend
batched_logits_processor batching_type build_config calib_config checkpoint_format
checkpoint_loader context_parallel_size context_servers cp_config cuda_graph_batch_sizes
cuda_graph_config cuda_graph_max_batch_size cuda_graph_padding_enabled decoding_config dwdp_size
disable_overlap_scheduler disagg_cluster embedding_parallel_mode enable_attention_dp
enable_autotuner enable_build_cache enable_chunked_context enable_chunked_prefill
enable_iter_perf_stats enable_iter_req_stats enable_layerwise_nvtx_marker enable_lora
enable_min_latency enable_prompt_adapter enable_sleep enable_tqdm enable_trtllm_sampler
env_overrides extended_runtime_perf_knob_config fail_fast_on_attention_window_too_large
fast_build force_dynamic_quantization garbage_collection_gen0_threshold
gather_generation_logits generation_servers gpus_per_node guided_decoding_backend hostname
iter_stats_max_iterations kv_cache_config kv_cache_dtype kv_connector_config load_format
load_tokenizer lora_config max_beam_width max_input_len max_lora_rank max_loras max_cpu_loras
max_prompt_adapter_token metadata_server_config mixed_sampler mm_encoder_only
moe_backend moe_cluster_parallel_size moe_config moe_expert_parallel_size moe_load_balancer
moe_max_num_tokens moe_tensor_parallel_size mpi_session normalize_log_probs num_instances
num_postprocess_workers nvfp4_gemm_config orchestrator_type otlp_config otlp_traces_endpoint
peft_cache_config perf_metrics_max_requests pipeline_parallel_size port
postprocess_tokenizer_dir print_iter_log pytorch_backend_config pytorch_config quant_config
ray_worker_extension_cls reasoning_parser request_stats_max_iterations return_perf_metrics
revision router sampler_force_async_worker sampler_type scheduler_config server_role
skip_tokenizer_init sparse_attention_config speculative_config stream_interval
tensor_parallel_size tokenizer tokenizer_mode tokenizer_revision tool_parser
torch_compile_config torch_compile_enabled torch_compile_fullgraph trust_remote_code urls
use_cuda_graph use_kv_cache use_torch_sampler workspace
"""
KNOWN: Final = frozenset(_LISTED.split())
"""Keys of TensorRT-LLM's model of its arguments, and of a server's section, that do nothing
here."""

_CLOSE: Final = 0.8
"""Names at least so alike (`difflib`) are one name and a slip of the pen."""


class TrtllmKeys:
    """Translates what was read from a file and the environment; collects what is to be said."""

    def __init__(self, own_names: Collection[str]) -> None:
        """`own_names` are Baton's settings of this process."""
        self._own = frozenset(own_names)
        self.names = frozenset({SECTION, *EQUAL, *KNOWN})
        """Understood in a file beside Baton's own."""
        self.notes: list[str] = []

    def translate(
        self, values: Mapping[str, Any], where: str, environ: Mapping[str, str]
    ) -> dict[str, Any]:
        """In Baton's names, unknown keys left as they are. Raises ConfigError."""
        kept: dict[str, Any] = {}
        meant: dict[str, tuple[str, Any]] = {}
        unused = []
        for name, value in values.items():
            if name == SECTION:
                continue  # read below
            if name in self._own:
                kept[name] = value
            elif name in EQUAL:
                meant[EQUAL[name]] = (f"`{name}: {value}`", _whole(where, name, value))
            elif name in KNOWN or (SECTION in values and not self._is_misspelt(name)):
                unused.append(name)
            else:
                kept[name] = value
        self._read_transceiver(values, environ, meant)
        for name, (said, value) in meant.items():
            if value is None:
                continue
            if kept.setdefault(name, value) != value:
                raise ConfigError(f"{where}: `{name}: {kept[name]}` contradicts {said}")
        if unused:
            self.notes.append(f"{where}: without effect here: {', '.join(sorted(unused))}")
        return kept

    def _is_misspelt(self, name: str) -> bool:
        return bool(difflib.get_close_matches(name, self._own, n=1, cutoff=_CLOSE))

    def _read_transceiver(
        self,
        values: Mapping[str, Any],
        environ: Mapping[str, str],
        meant: dict[str, tuple[str, Any]],
    ) -> None:
        """TensorRT-LLM's variables say less than any word of the file about the same setting."""
        section = read_section(values.get(SECTION), {} if "transfer" in values else environ)
        variables = read_environment(environ)
        self.notes += section.notes + variables.notes
        for name, value in section.settings.items():
            meant[name] = (f"{SECTION}, which asks for {value}", value)
        for name, value in variables.settings.items():
            if name not in values:
                meant[name] = (name, value)


def _whole(where: str, name: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: {name}: expected a whole number, got {value!r}")

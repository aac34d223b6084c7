"""What an operator can set for a worker: built by the command, passed down as values."""

from typing import Annotated, Literal

import msgspec

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings, about
from protocol.worker_info import Role


class WorkerConfig(ProcessSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times end in `_ms`. See `docs/configuration.md`."""

    role: Annotated[Role, about("what it does")] = "both"
    engine: Annotated[Literal["torch", "simulated", "vllm"], about("what computes")] = "torch"
    url: Annotated[str, about("vllm: where its server is, without /v1")] = ""
    url_api_key: Annotated[str, about("vllm: its --api-key")] = ""
    kv_events_url: Annotated[
        str, about("vllm: where its KV events come from, tcp://...; with a * we listen there")
    ] = ""
    kv_replay_url: Annotated[str, about("vllm: its replay_endpoint for KV events")] = ""
    engine_silence_ms: Annotated[
        int, about("vllm: its jobs move when it has not answered for so long")
    ] = 8_000
    engine_start_timeout_ms: Annotated[
        int, about("vllm: its server is waited for so long at start")
    ] = 300_000
    model: Annotated[
        str,
        about(
            "folder of a Hugging Face model; empty: the demo model (simulated: only its text files "
            "are read; empty: a token for each byte)"
        ),
    ] = ""
    served_model_name: Annotated[str, about("the name clients ask for; empty: the folder's")] = ""
    device: Annotated[
        str, about("where torch computes and KV is: cpu, cuda (the first GPU) or cuda:N")
    ] = "cpu"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        about("of weights and KV; auto: float32 on CPU, the model's own on a GPU"),
    ] = "auto"
    threads: Annotated[int, about("of the computation; 0: all cores")] = 0
    host: Annotated[str, about("address under which other workers reach our transfers")] = (
        "127.0.0.1"
    )
    transfer: Annotated[
        Literal["auto", "nixl", "ucx", "shm", "tcp"],
        about(
            "how KV moves; auto: nixl with RDMA or KV on a GPU, else shm on one host, else nixl "
            "where CMA works, else tcp (ucx only by name)"
        ),
    ] = "auto"
    transfer_port: Annotated[
        int, about("where the tcp or ucx transfer listens; 0: any free port")
    ] = 0
    nixl_backend: Annotated[Literal["UCX", "LIBFABRIC"], about("what nixl moves bytes with")] = (
        "UCX"
    )
    nixl_plugin_dir: Annotated[str, about("where nixl finds its plugins; empty: its own")] = ""
    metrics_port: Annotated[int, about("serves /metrics; 0: not served, -1: any free port")] = 0
    block_size: Annotated[int, about("tokens in a KV block")] = 32
    num_blocks: Annotated[int, about("KV blocks; 0: as many as kv_memory_mb holds")] = 0
    kv_memory_mb: Annotated[int, about("memory for KV")] = 256
    max_running: Annotated[int, about("sequences in one step")] = 64
    max_step_tokens: Annotated[
        int, about("tokens in one step: long prompts are prefilled in chunks")
    ] = 512
    max_context: Annotated[int, about("tokens of one sequence; 0: the model's")] = 0
    max_tokens_in_buffer: Annotated[
        int | None, about("tokens being pulled at once; none: no bound")
    ] = None
    lease_ms: Annotated[int, about("lent blocks are kept this long after the last renewal")] = (
        30_000
    )
    kv_transfer_timeout_ms: Annotated[int, about("a pull may go without progress for so long")] = (
        60_000
    )
    max_quarantined_blocks: Annotated[
        int,
        about(
            "more blocks that a given-up transfer may still write end the process; 0: half of all"
        ),
    ] = 0
    linger_ms: Annotated[int, about("an ended attempt can be asked for again for so long")] = 60_000
    router_timeout_ms: Annotated[int, about("a router silent for so long loses its jobs here")] = (
        15_000
    )
    etcd_ttl_ms: Annotated[int, about("of the lease on our key")] = 10_000
    drain_timeout_ms: Annotated[
        int, about("after SIGTERM, running jobs and lent blocks get this long")
    ] = 60_000
    labels: Annotated[dict[str, str], about("free text for people, only in a config file")] = (
        msgspec.field(default_factory=dict)
    )
    sim_step_ms: Annotated[float, about("simulated: one engine step")] = 5.0
    sim_step_per_sequence_ms: Annotated[float, about("simulated: more for each sequence in it")] = (
        0.0
    )
    sim_prefill_tokens_per_s: Annotated[float, about("simulated: prefill pace; 0: no time")] = (
        20_000.0
    )
    sim_transfer_bytes_per_s: Annotated[
        float, about("simulated: transfer pace; 0: as fast as it goes")
    ] = 0.0
    sim_kv_bytes_per_token: Annotated[int, about("simulated: at least 16")] = 64
    sim_hold: Annotated[
        str, about("simulated: no step ends while this file exists; for tests, empty: none")
    ] = ""

    def check(self) -> None:
        super().check()
        if self.engine == "vllm" and not self.url.startswith(("http://", "https://")):
            raise ConfigError("engine vllm needs url: http://HOST:PORT of its server")
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.endswith("_ms") and value <= 0 and not field.startswith("sim_"):
                raise ConfigError(f"{field} must be above 0")
        for field in ("block_size", "max_running", "max_step_tokens", "kv_memory_mb"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1")
        for field, lowest in (("transfer_port", 0), ("metrics_port", -1)):
            port = getattr(self, field)
            if not lowest <= port <= 65_535:
                raise ConfigError(f"{field} {port} is not a port")
        if self.max_tokens_in_buffer is not None and self.max_tokens_in_buffer < 1:
            raise ConfigError("max_tokens_in_buffer must be at least 1, or none for no bound")
        if self.etcd_ttl_ms < 1_000:
            raise ConfigError("etcd_ttl_ms must be at least 1000: etcd counts seconds")

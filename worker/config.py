"""What an operator can set for a worker: built by the command, passed down as values."""

from typing import Literal

import msgspec

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings
from protocol.worker_info import Role


class WorkerConfig(ProcessSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times end in `_ms`. See `docs/configuration.md`."""

    role: Role = "both"
    engine: Literal["torch", "simulated"] = "torch"
    model: str = ""
    """Folder of a Hugging Face model; empty: the demo model."""
    served_model_name: str = ""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0
    """Of the engine's computation; 0: all cores."""
    host: str = "127.0.0.1"
    """Address under which other workers reach our transfers."""
    transfer: Literal["auto", "nixl", "ucx", "shm", "tcp"] = "auto"
    transfer_port: int = 0
    metrics_port: int = 0
    """0: no metrics endpoint; -1: any free port, said in the log."""
    block_size: int = 32
    num_blocks: int = 0
    """KV blocks; 0: as many as `kv_memory_mb` holds."""
    kv_memory_mb: int = 256
    max_running: int = 64
    max_step_tokens: int = 512
    max_context: int = 0
    """0: the model's."""
    max_tokens_in_buffer: int | None = None
    lease_ms: int = 30_000
    kv_transfer_timeout_ms: int = 60_000
    max_quarantined_blocks: int = 0
    """0: a quarter of the blocks."""
    linger_ms: int = 60_000
    router_timeout_ms: int = 15_000
    etcd_ttl_ms: int = 10_000
    drain_timeout_ms: int = 60_000
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    sim_step_ms: float = 5.0
    sim_step_per_sequence_ms: float = 0.0
    sim_prefill_tokens_per_s: float = 20_000.0
    sim_transfer_bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    sim_kv_bytes_per_token: int = 64

    def check(self) -> None:
        super().check()
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.endswith("_ms") and value <= 0 and not field.startswith("sim_"):
                raise ConfigError(f"{field} must be above 0")
        for field in ("block_size", "max_running", "max_step_tokens", "kv_memory_mb"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1")
        if self.etcd_ttl_ms < 1_000:
            raise ConfigError("etcd_ttl_ms must be at least 1000: etcd counts seconds")

"""What an operator can set for a router: one frozen struct from YAML, environment and flags."""

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings
from router.scheduling.limits import Limits


class RouterConfig(ProcessSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times end in `_ms`. See `docs/configuration.md`."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: str = ""
    tls_key: str = ""
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    max_choices: int = 1024
    queue_timeout_ms: int = 30_000
    accept_timeout_ms: int = 1_000
    silence_timeout_ms: int = 2_500
    prefill_timeout_ms: int = 30_000
    decode_wait_timeout_ms: int = 30_000
    kv_transfer_timeout_ms: int = 60_000
    stall_timeout_ms: int = 10_000
    replay_timeout_ms: int = 1_000
    client_stall_timeout_ms: int = 30_000
    request_timeout_ms: int | None = None
    drain_timeout_ms: int = 30_000
    max_queue: int = 4_096
    max_attempts: int = 4
    local_prefill_tokens: int = 4

    def check(self) -> None:
        super().check()
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.endswith("_ms") and value is not None and value <= 0:
                raise ConfigError(f"{field} must be above 0")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port {self.port} is not a port")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key belong together")

    def limits(self) -> Limits:
        """The scheduler's part, in seconds."""
        request_s = None if self.request_timeout_ms is None else self.request_timeout_ms / 1e3
        return Limits(
            queue_timeout_s=self.queue_timeout_ms / 1e3,
            accept_timeout_s=self.accept_timeout_ms / 1e3,
            silence_timeout_s=self.silence_timeout_ms / 1e3,
            prefill_timeout_s=self.prefill_timeout_ms / 1e3,
            decode_wait_timeout_s=self.decode_wait_timeout_ms / 1e3,
            kv_transfer_timeout_s=self.kv_transfer_timeout_ms / 1e3,
            stall_timeout_s=self.stall_timeout_ms / 1e3,
            replay_timeout_s=self.replay_timeout_ms / 1e3,
            request_timeout_s=request_s,
            max_queue=self.max_queue,
            max_attempts=self.max_attempts,
            local_prefill_tokens=self.local_prefill_tokens,
        )

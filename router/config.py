"""What an operator can set for a router: one frozen struct from YAML, environment and flags."""

from typing import Annotated, Final

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings, about
from router.scheduling.limits import Limits

MAX_PROCESSES: Final = 128


class RouterConfig(ProcessSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times end in `_ms`. See `docs/configuration.md`."""

    host: Annotated[str, about("where to listen")] = "127.0.0.1"
    port: Annotated[int, about("where to listen; 0: any free port")] = 8000
    processes: Annotated[
        int,
        about(
            "routers that share the port, under a parent that restarts them one by one at SIGHUP; "
            "0: a single one without a parent"
        ),
    ] = 0
    tls_cert: Annotated[str, about("certificate of the HTTP endpoint")] = ""
    tls_key: Annotated[str, about("key of that certificate")] = ""
    api_keys: Annotated[
        tuple[str, ...], about("keys clients must send, comma-separated; empty: none is asked for")
    ] = ()
    max_body_bytes: Annotated[int, about("a larger request body is a 413")] = 32 << 20
    max_choices: Annotated[int, about("choices in one request (n times prompts)")] = 1024
    queue_timeout_ms: Annotated[int, about("a choice waits this long for a worker, then 503")] = (
        30_000
    )
    accept_timeout_ms: Annotated[
        int, about("a worker says within this time that it has a job, or another gets it")
    ] = 1_000
    silence_timeout_ms: Annotated[
        int, about("a worker without a load report for so long loses its jobs")
    ] = 2_500
    prefill_timeout_ms: Annotated[int, about("a prefill may go without progress for so long")] = (
        30_000
    )
    decode_wait_timeout_ms: Annotated[
        int, about("KV waits this long for a place on a decode worker")
    ] = 30_000
    kv_transfer_timeout_ms: Annotated[int, about("a pull may go without progress for so long")] = (
        60_000
    )
    stall_timeout_ms: Annotated[int, about("a stream may go without a token for so long")] = 10_000
    replay_timeout_ms: Annotated[
        int, about("a worker answers a replay within this time, or its work moves")
    ] = 1_000
    client_stall_timeout_ms: Annotated[int, about("a client may take nothing for so long")] = 30_000
    ping_interval_ms: Annotated[
        int, about("a stream whose first token is not there yet gets a comment this often")
    ] = 15_000
    outage_timeout_ms: Annotated[
        int, about("NATS may be away for so long before the requests that run end with a 503")
    ] = 120_000
    request_timeout_ms: Annotated[
        int | None, about("cap on a whole request; none by default, so long answers are never cut")
    ] = None
    drain_timeout_ms: Annotated[int, about("after SIGTERM, running requests get this long")] = (
        30_000
    )
    idle_grace_ms: Annotated[
        int,
        about(
            "after SIGTERM, a connection without a request is kept this long: one may be on its way"
        ),
    ] = 5_000
    max_queue: Annotated[int, about("waiting choices; more are rejected at once")] = 4_096
    max_attempts: Annotated[int, about("dispatches of one choice without progress")] = 4
    local_prefill_tokens: Annotated[
        int, about("an uncached part this short is prefilled where it decodes")
    ] = 4

    def check(self) -> None:
        super().check()
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.endswith("_ms") and value is not None and value <= 0:
                raise ConfigError(f"{field} must be above 0")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port {self.port} is not a port")
        if not 0 <= self.processes <= MAX_PROCESSES:
            raise ConfigError(f"processes must be 0 to {MAX_PROCESSES}, not {self.processes}")
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
            outage_timeout_s=self.outage_timeout_ms / 1e3,
            request_timeout_s=request_s,
            max_queue=self.max_queue,
            max_attempts=self.max_attempts,
            local_prefill_tokens=self.local_prefill_tokens,
        )

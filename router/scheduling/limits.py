"""The scheduler's settings, as values. Seconds and counts; validated in the router's config."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines bound silence, not work; see the deadline table in `docs/`."""

    queue_timeout_s: float = 30.0
    accept_timeout_s: float = 1.0
    silence_timeout_s: float = 2.5
    prefill_timeout_s: float = 30.0
    decode_wait_timeout_s: float = 30.0
    kv_transfer_timeout_s: float = 60.0
    stall_timeout_s: float = 10.0
    replay_timeout_s: float = 1.0
    """How long a replay may stay unanswered before the work moves."""
    outage_timeout_s: float = 120.0
    """How long our own bus may be away before what runs ends with it."""
    request_timeout_s: float | None = None
    max_queue: int = 4096
    """Choices waiting; more are rejected at once."""
    max_attempts: int = 4
    progress_tokens: int = 64
    """Tokens that reset the count of attempts."""
    retry_share: float = 0.2
    retry_floor: int = 16
    retry_window_s: float = 10.0
    lease_s: float = 30.0
    """The shortest lease assumed; handles are renewed every third of their own."""
    unlisted_grace_s: float = 30.0
    """A worker whose key has vanished but that still reports is kept this long."""
    suspect_s: float = 1.0
    """First suspicion; doubles with repetition."""
    suspect_max_s: float = 30.0
    max_index_blocks: int = 2_000_000
    local_prefill_tokens: int = 4
    """An uncached part this short is prefilled by the decode worker itself."""
    num_samples: int = 4
    """Random candidates besides the prefix holders and the freest."""

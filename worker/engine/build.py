"""From a worker's configuration to its engine. Torch is imported only where it is asked for."""

from protocol.errors import ConfigError
from worker.config import WorkerConfig
from worker.engine.base import Engine
from worker.engine.simulated import SimulatedConfig, build_simulated
from worker.engine.stepper import StepperConfig
from worker.transfer.base import Transfer
from worker.transfer.select import build_transfers


def build_engine(config: WorkerConfig, *, worker: str, incarnation: str) -> Engine:
    """Raises ConfigError with one clear line."""
    is_simulated = config.engine == "simulated"
    transfers = build_transfers(
        config.transfer,
        host=config.host,
        tcp_port=config.transfer_port,
        throttle_bytes_per_s=(config.sim_transfer_bytes_per_s or None) if is_simulated else None,
    )
    stepper = StepperConfig(
        worker=worker,
        incarnation=incarnation,
        engine=config.engine,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        lease_s=config.lease_ms / 1e3,
        transfer_timeout_s=config.kv_transfer_timeout_ms / 1e3,
        max_tokens_in_flight=config.max_tokens_in_buffer,
        max_quarantined_blocks=config.max_quarantined_blocks or None,
    )
    if is_simulated:
        return build_simulated(_simulated(config), transfers, stepper)
    return _torch(config, transfers, stepper)


def _simulated(config: WorkerConfig) -> SimulatedConfig:
    block_bytes = config.block_size * config.sim_kv_bytes_per_token
    return SimulatedConfig(
        name=config.served_model_name,
        num_blocks=config.num_blocks or min((config.kv_memory_mb << 20) // block_bytes, 65_536),
        block_size=config.block_size,
        kv_bytes_per_token=config.sim_kv_bytes_per_token,
        max_running=config.max_running,
        max_context=config.max_context or 1 << 17,
        prefill_tokens_per_s=config.sim_prefill_tokens_per_s,
        step_s=config.sim_step_ms / 1e3,
        step_per_seq_s=config.sim_step_per_sequence_ms / 1e3,
    )


def _torch(config: WorkerConfig, transfers: list[Transfer], stepper: StepperConfig) -> Engine:
    try:
        from worker.engine.torch_engine import build_torch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the torch engine needs the package {error.name!r}: install baton-serve[torch]"
        ) from None
    return build_torch(config, transfers, stepper)

"""From a worker's configuration to its engine. Torch is imported only where it is asked for."""

import logging
import os
import secrets
import time
from pathlib import Path
from typing import Final

from protocol.errors import ConfigError
from text.assets import AssetsError, ModelAssets, load_assets
from worker.config import WorkerConfig
from worker.engine.base import Engine
from worker.engine.simulated import SimulatedConfig, build_simulated
from worker.engine.stepper import StepperConfig
from worker.transfer.base import Transfer
from worker.transfer.select import TransferOptions, build_transfers

_log: Final = logging.getLogger("baton.worker")


def build_engine(config: WorkerConfig, *, worker: str, incarnation: str) -> Engine:
    """Raises ConfigError with one clear line."""
    if config.engine == "vllm":
        return _vllm(config, worker, incarnation)
    is_simulated = config.engine == "simulated"
    options = TransferOptions(
        requested=config.transfer,
        agent_name=f"{worker}.{incarnation}",
        host=config.host,
        port=config.transfer_port,
        nixl_backend=config.nixl_backend,
        nixl_plugin_dir=config.nixl_plugin_dir,
        on_gpu=not is_simulated and config.device.startswith("cuda"),
        throttle_bytes_per_s=(config.sim_transfer_bytes_per_s or None) if is_simulated else None,
    )
    found = build_transfers(options, os.environ)
    for verdict in found.verdicts:
        runs = "on" if verdict.runs else "off"
        _log.info("transfer %s %s: %s", verdict.name, runs, verdict.reason)
    transfers = found.transfers
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
        transport_reasons={verdict.name: verdict.reason for verdict in found.verdicts},
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
        assets=_text(config.model) if config.model else None,
        hold=config.sim_hold,
    )


def _text(folder: str) -> ModelAssets:
    try:
        return load_assets(Path(folder))
    except AssetsError as error:
        raise ConfigError(str(error)) from None


def _torch(config: WorkerConfig, transfers: list[Transfer], stepper: StepperConfig) -> Engine:
    try:
        from worker.engine.torch_engine import build_torch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the torch engine needs the package {error.name!r}: install baton-serve[torch]"
        ) from None
    return build_torch(config, transfers, stepper)


def _vllm(config: WorkerConfig, worker: str, incarnation: str) -> Engine:
    from worker.engine.vllm.engine import VllmConfig, VllmEngine

    settings = VllmConfig(
        url=config.url,
        worker=worker,
        incarnation=incarnation,
        model_folder=config.model,
        served_name=config.served_model_name,
        api_key=config.url_api_key,
        kv_events_url=config.kv_events_url,
        kv_replay_url=config.kv_replay_url,
        lease_s=config.lease_ms / 1e3,
        max_running=config.max_running,
        start_timeout_s=config.engine_start_timeout_ms / 1e3,
        silent_s=config.engine_silence_ms / 1e3,
    )
    return VllmEngine(
        settings,
        clock=time.monotonic,
        wall_clock=time.time,
        new_id=lambda: secrets.token_hex(16),
    )

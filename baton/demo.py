"""The demo model: a small trained Llama that comes with the package."""

from pathlib import Path

import msgspec

from worker.config import WorkerConfig

DEMO_MODEL = "demo"


def demo_model_folder() -> Path:
    return Path(__file__).parent / "demo_model"


def with_model(config: WorkerConfig) -> WorkerConfig:
    """Fill in the model's folder and the name it is served under."""
    if config.engine == "vllm":
        return config  # its server names the model
    name = config.served_model_name
    if not config.model:
        folder = str(demo_model_folder()) if config.engine == "torch" else ""
        return msgspec.structs.replace(config, model=folder, served_model_name=name or DEMO_MODEL)
    if not name:
        name = Path(config.model).resolve().name
        config = msgspec.structs.replace(config, served_model_name=name)
    return config

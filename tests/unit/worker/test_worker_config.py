"""Settings of a worker that cannot work are one line at its start."""

import pytest

from protocol.errors import ConfigError
from worker.config import WorkerConfig


@pytest.mark.parametrize(
    ("field", "port"),
    [
        ("transfer_port", -1),
        ("transfer_port", 65_536),
        ("transfer_port", 70_000),
        ("metrics_port", -2),
        ("metrics_port", 65_536),
    ],
)
def test_a_port_that_is_none_is_named(field: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"^{field} {port} is not a port$"):
        WorkerConfig(**{field: port}).check()  # type: ignore[arg-type]


def test_every_port_and_the_words_for_any_and_none_will_do() -> None:
    for port in (0, 1, 65_535):
        WorkerConfig(transfer_port=port, metrics_port=port).check()
    WorkerConfig(metrics_port=-1).check()

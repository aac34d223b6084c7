"""What cannot be a NATS server, or a file, is said before anything is tried."""

from pathlib import Path

import pytest

from protocol.nats_config import NatsConfig, connect_options


@pytest.mark.parametrize(
    "url", ["nats://127.0.0.1:4222", "tls://nats.example", "127.0.0.1:4222", "nats://u:p@h:1"]
)
def test_good_urls(url: str) -> None:
    assert connect_options(NatsConfig(urls=(url,)))["servers"] == [url]


@pytest.mark.parametrize(
    "url",
    ["http://h:4222", "ws://h:4222", "nats://", "nats://:4222", "nats://h:port", "nats://h:0"],
)
def test_urls_that_name_no_nats_server(url: str) -> None:
    with pytest.raises(ValueError, match="is not nats://host:port or tls://host:port"):
        connect_options(NatsConfig(urls=(url,)))


def test_no_password_in_what_is_said() -> None:
    with pytest.raises(ValueError, match="'http://h:1'") as caught:
        connect_options(NatsConfig(urls=("http://user:secret@h:1",)))
    assert "secret" not in str(caught.value)


def test_no_url_at_all() -> None:
    with pytest.raises(ValueError, match="at least one"):
        connect_options(NatsConfig(urls=()))


@pytest.mark.parametrize("field", ["tls_ca", "tls_cert", "tls_key", "creds_file"])
def test_a_missing_file_is_named(tmp_path: Path, field: str) -> None:
    path = str(tmp_path / "missing.pem")
    with pytest.raises(OSError, match=r"missing\.pem"):
        connect_options(NatsConfig(**{field: path}))  # type: ignore[arg-type]

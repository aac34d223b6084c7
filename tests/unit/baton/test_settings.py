"""Settings from file, environment and flags, and the errors an operator sees."""

import argparse
from pathlib import Path

import pytest

from baton.settings import add_flags, load_settings
from protocol.errors import ConfigError
from router.config import RouterConfig
from scripts.write_settings_doc import TARGET, document
from worker.config import WorkerConfig


def parsed(*flags: str, config: type = RouterConfig) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return parser.parse_args(flags)


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("port: 1000\nstall_timeout_ms: 1\nmax_queue: 7\nnats: [nats://a:1]\n")
    environ = {"BATON_STALL_TIMEOUT_MS": "2", "BATON_PORT": "2000", "HOME": "/"}
    config = load_settings(RouterConfig, parsed("--config", str(file), "--port", "3000"), environ)
    assert (config.port, config.stall_timeout_ms, config.max_queue) == (3000, 2, 7)
    assert config.nats == ("nats://a:1",)


def test_lists_are_comma_separated_on_the_command_line() -> None:
    config = load_settings(RouterConfig, parsed("--nats", "nats://a:1, nats://b:2"), {})
    assert config.nats == ("nats://a:1", "nats://b:2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1\n", "unknown key `prot`; did you mean `port`?"),
        ("port: many\n", "port: Expected `int`"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
        ("stall_timeout_ms: 0\n", "stall_timeout_ms must be above 0"),
        ("port: 70000\n", "port 70000 is not a port"),
        ("namespace: a.b\n", "namespace 'a.b' may have only"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(RouterConfig, parsed("--config", str(file)), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_variable_is_said_and_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    load_settings(WorkerConfig, parsed(config=WorkerConfig), {"BATON_LEASE": "1"})
    assert "ignored BATON_LEASE; did you mean `lease_ms`?" in capsys.readouterr().err


def test_a_missing_file_is_said() -> None:
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        load_settings(RouterConfig, parsed("--config", "/nowhere"), {})


def test_the_page_of_settings_is_up_to_date() -> None:
    assert TARGET.read_text() == document()

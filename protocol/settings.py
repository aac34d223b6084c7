"""What every Baton process has in common in its configuration: bus, registry, names, logs.

Built once by the command from YAML, environment and flags, then passed down as values.
"""

from typing import Literal

import msgspec

from protocol.errors import ConfigError
from protocol.ids import is_name


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times that operators set end in `_ms`."""

    nats: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    nats_user: str = ""
    nats_password: str = ""
    nats_token: str = ""
    nats_credentials: str = ""
    nats_ca: str = ""
    nats_cert: str = ""
    nats_key: str = ""
    etcd: tuple[str, ...] = ("http://127.0.0.1:2379",)
    etcd_user: str = ""
    etcd_password: str = ""
    etcd_ca: str = ""
    etcd_cert: str = ""
    etcd_key: str = ""
    namespace: str = "default"
    name: str = ""
    """Of this process, in subjects, keys, logs and metrics; empty: made up."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    def check(self) -> None:
        """Raises ConfigError, one line."""
        for what, value in (("namespace", self.namespace), ("name", self.name or "x")):
            if not is_name(value):
                raise ConfigError(
                    f"{what} {value!r} may have only letters, digits, '-' and '_', at most 64"
                )

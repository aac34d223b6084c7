"""What every Baton process has in common in its configuration: bus, registry, names, logs.

Built once by the command from YAML, environment and flags, then passed down as values. The text
beside each field is its `--help` and its row in `docs/configuration.md`.
"""

from typing import Annotated, Literal

import msgspec

from protocol.errors import ConfigError
from protocol.ids import is_name


def about(text: str) -> msgspec.Meta:
    """The description of a setting."""
    return msgspec.Meta(description=text)


class ProcessSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times that operators set end in `_ms`."""

    nats: Annotated[tuple[str, ...], about("NATS servers, comma-separated (nats:// or tls://)")] = (
        "nats://127.0.0.1:4222",
    )
    nats_user: Annotated[str, about("NATS user")] = ""
    nats_password: Annotated[str, about("NATS password")] = ""
    nats_token: Annotated[str, about("NATS token, instead of a user")] = ""
    nats_credentials: Annotated[str, about("NATS .creds file")] = ""
    nats_ca: Annotated[str, about("authorities NATS is checked against; turns TLS on")] = ""
    nats_cert: Annotated[str, about("our certificate for NATS")] = ""
    nats_key: Annotated[str, about("key of that certificate")] = ""
    etcd: Annotated[tuple[str, ...], about("etcd endpoints, comma-separated")] = (
        "http://127.0.0.1:2379",
    )
    etcd_user: Annotated[str, about("etcd user")] = ""
    etcd_password: Annotated[str, about("etcd password")] = ""
    etcd_ca: Annotated[str, about("authorities etcd is checked against")] = ""
    etcd_cert: Annotated[str, about("our certificate for etcd")] = ""
    etcd_key: Annotated[str, about("key of that certificate")] = ""
    namespace: Annotated[str, about("separates fleets that share NATS and etcd")] = "default"
    name: Annotated[str, about("of this process in keys, logs and metrics; empty: made up")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], about("how much to log")] = (
        "info"
    )
    log_format: Annotated[Literal["text", "json"], about("one line per event, as text or JSON")] = (
        "text"
    )

    def check(self) -> None:
        """Raises ConfigError, one line."""
        for what, value in (("namespace", self.namespace), ("name", self.name or "x")):
            if not is_name(value):
                raise ConfigError(
                    f"{what} {value!r} may have only letters, digits, '-' and '_', at most 64"
                )

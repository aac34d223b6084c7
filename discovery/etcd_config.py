"""How to reach etcd. It must not know gRPC."""

import msgspec

from protocol.errors import ConfigError
from protocol.settings import ProcessSettings


class EtcdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where etcd is and who we are. Raises `ValueError` for what cannot work."""

    endpoints: list[str]
    """`http://host:port` or `https://host:port`; `host:port` means http."""
    namespace: str = "default"
    username: str = ""
    password: str = ""
    ca_cert: str = ""
    """Path of the authorities that etcd's certificate is checked against; empty: the built-in."""
    cert: str = ""
    """Path of our own certificate, with `key`, where etcd asks for one."""
    key: str = ""
    call_timeout_s: float = 1.5
    """One call waits no longer than that."""
    probe_s: float = 2.0
    """A quiet watch is checked that often."""
    relist_s: float = 30.0
    """Everything is listed again that often."""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("etcd: at least one endpoint is needed")
        for endpoint in self.endpoints:
            split_endpoint(endpoint)
        if bool(self.cert) != bool(self.key):
            raise ValueError("etcd: cert and key belong together")
        if self.password and not self.username:
            raise ValueError("etcd: a password without a username")
        if min(self.call_timeout_s, self.probe_s, self.relist_s) <= 0:
            raise ValueError("etcd: times must be positive")

    def __repr__(self) -> str:
        """Without the password."""
        return f"EtcdConfig({', '.join(self.endpoints)}; namespace {self.namespace})"


def split_endpoint(endpoint: str) -> tuple[bool, str]:
    """Whether to use TLS, and `host:port`. Raises `ValueError`."""
    scheme, separator, rest = endpoint.rpartition("://")
    address = rest.rstrip("/")
    if (separator and scheme not in ("http", "https")) or not address or "/" in address:
        raise ValueError(f"etcd: endpoint must be http://host:port or https://…, not {endpoint!r}")
    if not address.rpartition(":")[2].isdigit():
        address += ":2379"
    return scheme == "https", address


def from_settings(settings: ProcessSettings) -> EtcdConfig:
    """The registry of one process. Raises ConfigError."""
    try:
        return EtcdConfig(
            endpoints=list(settings.etcd),
            namespace=settings.namespace,
            username=settings.etcd_user,
            password=settings.etcd_password,
            ca_cert=settings.etcd_ca,
            cert=settings.etcd_cert,
            key=settings.etcd_key,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None

"""Where the NATS server is and how to be let in. Knows nothing of nats-py but its option names."""

import ssl
from typing import Any
from urllib.parse import urlsplit

import msgspec

from protocol.settings import ProcessSettings


class NatsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the server. Empty strings mean: not used."""

    urls: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    """`nats://` or `tls://`; `tls://` and any `tls_*` below never fall back to plain text."""
    user: str = ""
    password: str = ""
    token: str = ""
    creds_file: str = ""
    nkey_seed_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_hostname: str = ""
    tls_handshake_first: bool = False
    name: str = "baton"
    inbox_prefix: str = "_INBOX"
    """Replies come on `<prefix>.<random>.*`; we also publish there, to flush."""
    connect_timeout_s: float = 2.0
    ping_interval_s: float = 0.5
    max_outstanding_pings: int = 2
    """A frozen server is left after `ping_interval_s * (max_outstanding_pings + 1)`. Sooner than a
    silent worker is given up, or everybody behind a frozen server would seem dead."""
    reconnect_wait_s: float = 0.2
    pending_bytes: int = 64 << 20
    """Published but not yet given to the socket; beyond it `publish` raises BusOverflow."""
    close_timeout_s: float = 2.0

    def __repr__(self) -> str:
        return f"NatsConfig({', '.join(map(place, self.urls))})"


def place(url: str) -> str:
    """Host and port: what may be logged of a URL."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts.netloc.rpartition("@")[2]


def connect_options(config: NatsConfig) -> dict[str, Any]:
    """nats-py's arguments. Raises OSError or ValueError for URLs that cannot be any and files that
    do not load."""
    if not config.urls:
        raise ValueError("at least one URL is needed")
    for url in config.urls:
        _check_url(url)
    for path in (config.tls_ca, config.tls_cert, config.tls_key, config.creds_file):
        if path:  # ssl's own errors do not name the file
            with open(path, "rb"):
                pass
    options: dict[str, Any] = {
        "servers": list(config.urls),
        "name": config.name,
        "connect_timeout": config.connect_timeout_s,
        "reconnect_time_wait": config.reconnect_wait_s,
        "max_reconnect_attempts": -1,
        "ping_interval": config.ping_interval_s,
        "max_outstanding_pings": config.max_outstanding_pings,
        "inbox_prefix": config.inbox_prefix,
        # Never reached: `publish` checks the real bound first.
        "pending_size": 2 * config.pending_bytes,
        "user": config.user or None,
        "password": config.password or None,
        "token": config.token or None,
        "user_credentials": config.creds_file or None,
        "nkeys_seed": config.nkey_seed_file or None,
    }
    files = (config.tls_ca, config.tls_cert, config.tls_hostname)
    if any(files) or any(url.startswith("tls://") for url in config.urls):
        context = ssl.create_default_context(cafile=config.tls_ca or None)
        if config.tls_cert:
            context.load_cert_chain(config.tls_cert, config.tls_key or None)
        options["tls"] = context
        options["tls_handshake_first"] = config.tls_handshake_first
        options["tls_hostname"] = config.tls_hostname or None
    return options


def _check_url(url: str) -> None:
    """Raises ValueError for what would be looked for in vain for ever."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        is_good = parts.scheme in ("nats", "tls") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        is_good = False
    if not is_good:
        shown = f"{parts.scheme}://{place(url)}"
        raise ValueError(f"{shown!r} is not nats://host:port or tls://host:port")


def from_settings(settings: ProcessSettings, name: str) -> NatsConfig:
    """The connection of one process, named for the server's list of clients."""
    return NatsConfig(
        urls=settings.nats,
        user=settings.nats_user,
        password=settings.nats_password,
        token=settings.nats_token,
        creds_file=settings.nats_credentials,
        tls_ca=settings.nats_ca,
        tls_cert=settings.nats_cert,
        tls_key=settings.nats_key,
        name=name,
    )

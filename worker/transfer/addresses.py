"""Which IP address others reach us at, and whether an offered one can be connected to."""

import ipaddress
import socket

from protocol.errors import ConfigError


def reachable(host: str) -> str:
    """The IP address that others connect to. Raises ConfigError if the name has none."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError(f"no address for transfer host {host!r}: {error.strerror}") from error
    if not ipaddress.ip_address(address).is_unspecified:
        return str(address)
    return _own_address(is_v6=":" in str(address))


def wrong_place(host: str, port: int) -> str:
    """Why nobody can connect there; empty if one can. Names are resolved by the source: asking a
    name server for each pull could stall every transfer."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"{host!r} is no IP address"
    if address.is_unspecified or not 0 < port < 1 << 16:
        return f"{host}:{port} is no place to connect to"
    return ""


def _own_address(*, is_v6: bool) -> str:
    """Where packets to the outside leave from (nothing is sent); the loopback without a network."""
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    outside = "2001:db8::1" if is_v6 else "192.0.2.1"
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((outside, 9))
        except OSError:
            return "::1" if is_v6 else "127.0.0.1"
        return str(sock.getsockname()[0])

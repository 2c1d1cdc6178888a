"""Addresses and TCP ports of this machine."""

import ipaddress
import socket


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def is_free(host: str, port: int) -> bool:
    """Whether one could listen on it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def is_loopback(host: str) -> bool:
    """Whether this name or address is one that this machine alone can reach: no other name than localhost is believed,
    since what a name stands for may change."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)  # a socket that listens on IPv6 shows 127.0.0.1 as ::ffff:127.0.0.1
    return (address if mapped is None else mapped).is_loopback

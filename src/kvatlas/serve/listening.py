"""A socket at a configured address."""

from __future__ import annotations

import socket
from typing import Any

from kvatlas.errors import ConfigError
from kvatlas.netloc import netloc

FREE_PORT = "a free port of this machine, or 0 for any"


def bind(section: str, host: str, port: int, *, reuse_port: bool = False, listen: bool = False) -> socket.socket:
    """Return a TCP socket at the address of a section's settings ``host`` and ``port``. ConfigError where it cannot be had.

    ``reuse_port``: shared with other processes that ask for the same. ``listen``: it takes connections from now on; else once
    it is listened on, and only then is it certain that the port is nobody else's.
    """
    family, address = resolve(section, host, port)
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves TCP_NODELAY off
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
        if listen:
            bound.listen()
    except OSError as error:
        bound.close()
        raise taken(section, host, port, error) from None
    return bound


def resolve(section: str, host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address of what a host's name stands for. Waits for name servers. ConfigError where it is none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"{section}.host", f"{host!r} is no address: {error}", "an address of this machine") from None
    return family, address


def taken(section: str, host: str, port: int, error: OSError) -> ConfigError:
    """Return what is said where an address cannot be listened on."""
    return ConfigError(f"{section}.port", f"cannot listen on {netloc(host, port)}: {error.strerror}", FREE_PORT)

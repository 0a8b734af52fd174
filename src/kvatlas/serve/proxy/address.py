"""The proxy's address, taken before anybody is served there."""

from __future__ import annotations

import socket

from kvatlas.config.proxy import ProxySettings
from kvatlas.errors import ConfigError


def bind(settings: ProxySettings) -> socket.socket:
    """Return a socket at the proxy's address, which takes no connections yet. ConfigError where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError("proxy.host", f"{settings.host!r} is no address: {error}", "an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.reuse_port:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        problem = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        raise ConfigError("proxy.port", problem, "a free port of this machine, or 0 for any") from None
    return bound

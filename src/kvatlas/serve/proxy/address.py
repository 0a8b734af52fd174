"""The proxy's address, taken before anybody is served there."""

from __future__ import annotations

import socket

from kvatlas.config.proxy import ProxySettings
from kvatlas.serve import listening


def bind(settings: ProxySettings) -> socket.socket:
    """Return a socket at the proxy's address, which takes no connections yet. ConfigError where that cannot be had."""
    return listening.bind("proxy", settings.host, settings.port, reuse_port=settings.reuse_port)

"""A host and a port as URLs and addresses have them."""

from __future__ import annotations


def netloc(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

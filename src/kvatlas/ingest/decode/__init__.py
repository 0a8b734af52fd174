"""Payload bytes to events, without IO: one decoder for each engine's format, chosen by name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol

from kvatlas.errors import ConfigError
from kvatlas.ingest.decode.header import Header, peek_header
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.types import DecodedPayload

__all__ = ["DECODERS", "DecodeLimits", "Decoder", "Header", "load_decoder", "peek_header"]


DECODERS = "kvatlas.decoders"
"""Entry point group that decoders are found in, by name."""


class Decoder(Protocol):
    """Reads one engine's payloads. Registered as an entry point in group ``kvatlas.decoders``: a class without arguments.

    One instance serves all streams, from any thread: what it needs to know is in the payload.
    """

    name: str
    wire: str | None
    """The name by which a native index knows this format and reads it as this decoder does; None if only the decoder does."""

    def decode(self, payload: bytes) -> DecodedPayload:
        """Return what a payload says.

        Raises DecodeError only if the payload as a whole is unreadable. One bad event in a readable payload is a
        DecodeFault, and the other events are kept.
        """
        ...


def load_decoder(name: str) -> Decoder:
    """Return a decoder by its entry point's name. Raises ConfigError for a name that is not installed or does not load."""
    installed = {entry.name: entry for entry in entry_points(group=DECODERS)}
    allowed = ", ".join(sorted(installed)) or "none (reinstall kvatlas)"
    if name not in installed:
        raise ConfigError("decoder", f"unknown decoder {name!r}", allowed)
    try:
        decoder: Decoder = installed[name].load()()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError("decoder", f"decoder {name!r} does not load: {error}", allowed) from error
    return decoder

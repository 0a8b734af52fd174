"""vLLM's events: maps today (vllm-project/vllm#42892; seen on a real vLLM 0.32), positional arrays in older versions."""

from __future__ import annotations

from kvatlas.ingest.decode import wire
from kvatlas.ingest.decode.engine import decode_payload
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.types import DecodedPayload


class VllmDecoder:
    """Reads a payload ``[timestamp, [events], data-parallel rank or nil]``; keeps no state between payloads.

    An event is a map with a ``type`` or an array ``[tag, ...]``; unknown keys and trailing fields are ignored, events of
    unknown types are harmless faults.
    """

    name = "vllm"

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self._limits = limits or DecodeLimits()
        self.wire = "vllm" if limits in (None, DecodeLimits()) else None

    def decode(self, payload: bytes) -> DecodedPayload:
        """Return one batch and the faults in it. Raises DecodeError: ``oversize``, ``not_msgpack`` or ``not_a_batch``."""
        return decode_payload(payload, wire.VLLM_ARRAYS, self._limits)

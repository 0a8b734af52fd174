"""SGLang's events: vLLM's protocol, with other trailing fields in positional arrays, signed hashes and media of its own.

``AllBlocksCleared`` empties the device. A cache salt names a block apart from its extra keys; it counts on the first block
only, because later blocks inherit it through the chain. Token pairs (EAGLE) are faults.
"""

from __future__ import annotations

from kvatlas.ingest.decode import wire
from kvatlas.ingest.decode.engine import decode_payload
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.types import DecodedPayload


class SglangDecoder:
    """Reads a payload ``[timestamp, [events], attention data-parallel rank]``; keeps no state between payloads."""

    name = "sglang"

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self._limits = limits or DecodeLimits()
        self.wire = "sglang" if limits in (None, DecodeLimits()) else None

    def decode(self, payload: bytes) -> DecodedPayload:
        """Return one batch and the faults in it. Raises DecodeError: ``oversize``, ``not_msgpack`` or ``not_a_batch``."""
        return decode_payload(payload, wire.SGLANG_ARRAYS, self._limits)

"""kvatlas's own event format, for caches that are neither vLLM's nor SGLang's.

A payload is msgpack, ``{"kvatlas": 1, "events": [...]}``, or protobuf, ``kvatlas.v1.EventBatch``. The first byte tells: a
msgpack map starts at 0x80 or above, and no field number of ``EventBatch`` gives a first byte that high. Both forms have the
same fields; ``encode_msgpack`` and ``encode_protobuf`` write them.

==============  =====================================================================================================
BlockCreated    ``block_id`` is held once more. With ``prefix`` it can be found: the block's tokens and
                ``parent_block_id`` (none for block 0), or without a parent the tokens of the whole prompt up to the
                block's end and ``block_size``. Then the blocks before it are stored and removed again, under hashes
                of :func:`prefix_hashes`: the index learns the way to the block and counts the block alone.
BlockEvicted    One copy of the block is gone. A block that was told by PrefixCached has no id: it is named by the
                ``prefix`` that ends with it, and so it can be in the other events.
BlockMigrated   One copy moved from ``from_tier`` to ``to_tier``, or to ``to_pod_id`` (and ``to_dp_rank``): stored
                there, then removed here. A pod that has not seen the block before needs ``prefix`` to find it.
PrefixCached    The pod holds every whole block of ``prefix`` from block 0, in ``tier``: one copy, however often it
                is told. Blocks are cut at ``block_size`` (else the decoder's, 16) and named by
                :func:`prefix_hashes`; a partial last block is left out. The first telling removes blocks that the
                index does not hold yet; it counts them as ``removed_unknown``, and that is no fault.
==============  =====================================================================================================

``block_id`` is a number, a digest (its last 8 bytes count) or a name (its XXH3-64 counts). Neighbouring events of one pod, rank
and model make up one batch. An event of a type that this version does not know is a harmless fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvatlas.errors import DecodeError
from kvatlas.ingest.decode.faults import EventFaultError, FaultLog
from kvatlas.ingest.decode.generic import msgpack_form, protobuf_form
from kvatlas.ingest.decode.generic.events import EventType, GenericEvent, block_hash, prefix_hashes
from kvatlas.ingest.decode.generic.msgpack_form import encode as encode_msgpack
from kvatlas.ingest.decode.generic.protobuf_form import encode as encode_protobuf
from kvatlas.ingest.decode.generic.translation import Translation
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.types import DecodedPayload

__all__ = [
    "EventType",
    "GenericDecoder",
    "GenericEvent",
    "block_hash",
    "encode_msgpack",
    "encode_protobuf",
    "prefix_hashes",
]

T = TypeVar("T")


class GenericDecoder:
    """Reads payloads in the generic format; keeps no state between payloads."""

    name = "generic"
    wire = None

    def __init__(self, limits: DecodeLimits | None = None, *, block_size_tokens: int = 16) -> None:
        """``block_size_tokens``: where a PrefixCached event does not say."""
        self._limits = limits or DecodeLimits()
        self._block_size_tokens = block_size_tokens

    def decode(self, payload: bytes) -> DecodedPayload:
        """Return what a payload says.

        Raises DecodeError: ``oversize``, ``not_msgpack``, ``not_protobuf``, ``not_a_batch`` or ``unsupported_version``.
        Faults of single events: ``unknown_event`` (harmless), ``missing_field``, ``bad_field``, ``bad_hash``,
        ``bad_tokens``, ``bad_block_size``, ``bad_prefix``, ``oversize_event``; ``more_faults``.
        """
        if len(payload) > self._limits.payload_bytes_max:
            raise DecodeError("oversize", f"{len(payload)} bytes; at most {self._limits.payload_bytes_max} are read")
        if not payload:
            raise DecodeError("not_a_batch", "an empty payload")
        if payload[0] >= 0x80:
            return self._read(msgpack_form.split(payload, self._limits), msgpack_form.read)
        return self._read(protobuf_form.split(payload, self._limits), protobuf_form.read)

    def _read(self, events: Sequence[T], read: Callable[[T, DecodeLimits], GenericEvent]) -> DecodedPayload:
        log = FaultLog(self._limits.faults_max)
        translation = Translation(self._limits, self._block_size_tokens)
        for raw in events:
            try:
                translation.add(read(raw, self._limits))
            except EventFaultError as error:
                log.add(error.fault)
        return DecodedPayload(translation.batches(), log.faults())

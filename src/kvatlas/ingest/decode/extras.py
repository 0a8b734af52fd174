"""A stored event's ``extra_keys``: what the engine hashed beside tokens, told as :class:`~kvatlas.types.Extra`.

vLLM 0.32 publishes, for each block: the LoRA name, then ``(item, offset in the block)`` for every multimodal item that
touches it, the cache salt (block 0 only) and a digest of prompt embeddings, all without tags. So what a string means follows
from its place; one that cannot be placed is kept as ``opaque``, so that two different blocks never share a key. A version that
published multimodal items as bare strings is read wrongly on block 0 (as a salt), which loses hits and never makes one up.
"""

from __future__ import annotations

import msgspec

from kvatlas.ingest.decode.faults import EventFaultError
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.ingest.decode.msgpack import UNREADABLE, array_length, explain, is_nil
from kvatlas.types import Extra

_RAWS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_VALUE = msgspec.msgpack.Decoder()
_SORTED = msgspec.msgpack.Encoder(order="sorted")

_OFFSET_MAX = 1 << 31


class ExtrasBudget:
    """How many more extras a payload may hold. Shared by its events: an extra costs 150 bytes and may take one on the wire."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.left = limits.extras_per_payload_max
        self.extra_bytes_max = limits.extra_bytes_max

    def take(self, count: int) -> None:
        if count > self.left:
            raise EventFaultError("oversize_event", f"extra_keys: {count} more, {self.left} left for this payload")
        self.left -= count


class Block0(msgspec.Struct, frozen=True):
    """What may only be read with knowledge of the event around the extra keys.

    ``present``: the event's first hash starts a chain (it has no parent). ``salt``: the salt, if the event says it apart.
    """

    present: bool
    salt: str | None = None


def read_extras(
    raw: msgspec.Raw, hashes: int, lora_name: str | None, block0: Block0, budget: ExtrasBudget
) -> tuple[tuple[Extra, ...], ...] | None:
    """Return one tuple of extras a hash, or None where the event has none.

    Raises EventFaultError ``extra_keys_length`` (not one entry a hash), ``bad_extra_keys`` or ``oversize_event``.
    """
    salt = block0.salt if block0.present and hashes else None
    if is_nil(raw):
        if salt is None:
            return None
        return ((Extra(0, "salt", salt.encode()),), *[()] * (hashes - 1))
    length = array_length(raw)
    if length is None:
        raise EventFaultError("bad_extra_keys", "extra_keys: neither an array nor nil")
    if length != hashes:
        raise EventFaultError("extra_keys_length", f"{length} extra_keys for {hashes} block hashes")
    try:
        entries = _RAWS.decode(raw)
        blocks = [
            () if is_nil(entry) else _read_block(entry, lora_name, block0.present and i == 0, salt is None, budget)
            for i, entry in enumerate(entries)
        ]
    except UNREADABLE as error:
        raise EventFaultError("bad_extra_keys", f"extra_keys: {explain(error)}") from error
    if salt is not None:
        blocks[0] = (*blocks[0], Extra(0, "salt", salt.encode()))
    return tuple(blocks)


def _read_block(
    entry: msgspec.Raw, lora_name: str | None, first: bool, salt_here: bool, budget: ExtrasBudget
) -> tuple[Extra, ...]:
    length = array_length(entry)
    if length is None:
        raise EventFaultError("bad_extra_keys", "extra_keys: an entry is neither an array nor nil")
    budget.take(length)
    extras: list[Extra] = []
    for i, item in enumerate(_RAWS.decode(entry)):
        if len(memoryview(item)) > budget.extra_bytes_max:
            raise EventFaultError("oversize_event", f"extra_keys: one of {len(memoryview(item))} bytes")
        value = _VALUE.decode(item)
        if isinstance(value, str):
            if i == 0 and value == lora_name:
                continue  # the adapter's name is in the root of the chain already
            if not first:
                extras.append(_opaque(item, value))
            elif salt_here:
                extras.append(Extra(0, "salt", value.encode()))
        elif isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
            extras.append(_item(value[0], value[1]))
        else:
            extras.append(_opaque(item, value))
    return tuple(extras)


def _item(identifier: str, offset_tokens: int) -> Extra:
    if not -_OFFSET_MAX <= offset_tokens < _OFFSET_MAX:
        raise EventFaultError("bad_extra_keys", f"extra_keys: an item at offset {offset_tokens}")
    return Extra(offset_tokens, "mm", identifier.encode())


def _opaque(item: msgspec.Raw, value: object) -> Extra:
    """Keep what is not understood: bytes as they are, anything else as msgpack with sorted keys."""
    if isinstance(value, bytes):
        return Extra(0, "opaque", value)
    try:
        return Extra(0, "opaque", _SORTED.encode(value))
    except TypeError:  # a map whose keys are no strings has no order: take the engine's
        return Extra(0, "opaque", bytes(item))

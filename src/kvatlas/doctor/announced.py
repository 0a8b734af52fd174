"""Blocks as an engine announced them, with hashes as they were sent: what recomputing its hashes needs.

The decoders keep 64 bits of a hash and drop what is only a name twice; here nothing may be dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from kvatlas.keys.engine_hashes import ExtraKey, HashedBlock


class _Stored(msgspec.Struct):
    """A stored event, as far as it matters here, in the order of vLLM's array form."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None


def announced_blocks(payload: bytes) -> Iterator[HashedBlock]:
    """Yield the blocks of a vLLM payload whose hashes can be computed from what the event says.

    Left out: events without tokens or with only some blocks' hashes, blocks of other tiers (they come without extra keys),
    and of LoRA adapters (their path is hashed, and no event tells it). Nothing is yielded for what is no such payload.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        return
    for event in batch[1]:
        stored = _stored(event)
        if stored is not None and stored.medium in (None, "GPU") and not (stored.lora_name or stored.lora_id):
            yield from _blocks(stored)


def _stored(event: Any) -> _Stored | None:
    """Return a stored event of either form; None for anything else."""
    fields = event
    if isinstance(event, list):
        fields = dict(zip(("type", *_Stored.__struct_fields__), event, strict=False))
    if not isinstance(fields, dict) or fields.get("type") != "BlockStored":
        return None
    try:
        return msgspec.convert(fields, _Stored)
    except msgspec.ValidationError:
        return None


def _blocks(stored: _Stored) -> Iterator[HashedBlock]:
    size = stored.block_size
    if size <= 0 or len(stored.token_ids) != size * len(stored.block_hashes):
        return
    extras = stored.extra_keys or [None] * len(stored.block_hashes)
    parent = None if stored.parent_block_hash is None else _hash_bytes(stored.parent_block_hash)
    for i, (block, extra) in enumerate(zip(map(_hash_bytes, stored.block_hashes), extras, strict=False)):
        keys = _extra_keys(extra or (), first=parent is None)
        if keys is not None:
            yield HashedBlock(block, parent, tuple(stored.token_ids[i * size : (i + 1) * size]), keys)
        parent = block


def _extra_keys(extra: Sequence[Any], *, first: bool) -> tuple[ExtraKey, ...] | None:
    """Return the tagged form that is hashed of the untagged one that is sent; None where the tag cannot be told."""
    keys: list[ExtraKey] = []
    for item in extra:
        if isinstance(item, str) and first:
            keys.append(("cache_salt", item))
        elif isinstance(item, bytes):
            keys.append(("prompt_embeds", item))
        elif isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int):
            keys.append(("mm", item[0], item[1]))
        else:
            return None
    return tuple(keys)


def _hash_bytes(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else (value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "big")

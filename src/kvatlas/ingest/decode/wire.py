"""Events as vLLM and SGLang put them on the wire: a map with a ``type``, or an array whose first element is the tag.

Field order is the array form's. Trailing fields that an engine leaves out have defaults, those beyond ours are ignored. What
may be long stays raw until its size was checked. Sources: vLLM 0.32 ``distributed/kv_events.py``; SGLang
``srt/disaggregation/kv_events.py``, whose array has grown step by step: up to ``lora_id``; ``medium``; a map with the
``cache_salt`` behind it; then vLLM's order up to ``ownership`` with that map behind it; at last maps.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw, Struct

from kvatlas.ingest.decode.msgpack import NIL


class Metadata(Struct, gc=False):
    """What SGLang attaches to a salted block."""

    cache_salt: str | None = None


class StoredFields(Struct, gc=False):
    """``BlockStored`` in the order that both engines share."""

    block_hashes: Raw
    parent_block_hash: Raw
    token_ids: Raw
    block_size: int | None
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | Metadata | None = None  # SGLang's shorter array has its metadata in this place
    extra_keys: Raw = NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None

    def session(self) -> str | None:
        return None

    def salt(self) -> str | None:
        """Return the cache salt where the event names it outside of its extra keys. It is repeated on later blocks."""
        return self.lora_name.cache_salt if isinstance(self.lora_name, Metadata) else None


class StoredMap(StoredFields, tag="BlockStored", tag_field="type", gc=False):
    session_id: str | None = None
    cache_salt: str | None = None
    metadata: Metadata | None = None

    def session(self) -> str | None:
        return self.session_id

    def salt(self) -> str | None:
        return self.cache_salt or (self.metadata.cache_salt if self.metadata else None)


class VllmStoredArray(StoredFields, tag="BlockStored", array_like=True, gc=False):
    session_id: str | None = None

    def session(self) -> str | None:
        return self.session_id


class SglangStoredArray(StoredFields, tag="BlockStored", array_like=True, gc=False):
    metadata: Metadata | None = None

    def salt(self) -> str | None:
        return self.metadata.cache_salt if self.metadata else super().salt()


class RemovedFields(Struct, gc=False):
    """``BlockRemoved`` in the order of vLLM."""

    block_hashes: Raw
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class RemovedMap(RemovedFields, tag="BlockRemoved", tag_field="type", gc=False):
    pass


class VllmRemovedArray(RemovedFields, tag="BlockRemoved", array_like=True, gc=False):
    pass


class SglangRemovedArray(Struct, tag="BlockRemoved", array_like=True, gc=False):
    """SGLang gives a removal the same five trailing fields as a store."""

    block_hashes: Raw
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None


class ClearedMap(Struct, tag="AllBlocksCleared", tag_field="type", gc=False):
    medium: str | None = None


class VllmClearedArray(Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    medium: str | None = None


class SglangClearedArray(Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    ownership: str | None = None

    @property
    def medium(self) -> None:
        return None


AnyStored = StoredMap | VllmStoredArray | SglangStoredArray
AnyRemoved = RemovedMap | VllmRemovedArray | SglangRemovedArray
AnyCleared = ClearedMap | VllmClearedArray | SglangClearedArray
AnyEvent = AnyStored | AnyRemoved | AnyCleared

MAPS: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(StoredMap | RemovedMap | ClearedMap)
VLLM_ARRAYS: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(VllmStoredArray | VllmRemovedArray | VllmClearedArray)
SGLANG_ARRAYS: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(
    SglangStoredArray | SglangRemovedArray | SglangClearedArray
)


class Batch(Struct, array_like=True, gc=False):
    """``[timestamp, [events], data-parallel rank]``; older engines leave out the rank."""

    ts: Raw
    events: Raw
    dp_rank: Raw = NIL


class TaggedMap(Struct, gc=False):
    """The part of a map that says what it is."""

    type: str


class TaggedArray(Struct, array_like=True, gc=False):
    """The part of an array that says what it is."""

    type: str

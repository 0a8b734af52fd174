"""Single fields of an event: wire value in, value of the vocabulary out, or an EventFaultError that says what was wrong."""

from __future__ import annotations

from array import array
from typing import cast

import msgspec

from kvatlas.ingest.decode.faults import EventFaultError
from kvatlas.ingest.decode.limits import DecodeLimits
from kvatlas.ingest.decode.msgpack import UNREADABLE, array_length, explain
from kvatlas.types import CPU, GPU, STORAGE, AttentionKind, EngineHash, GroupIdx, GroupSpec, Tier

_HASHES = msgspec.msgpack.Decoder(list[int | bytes])
_PARENT = msgspec.msgpack.Decoder(int | bytes | None)
_TOKENS = msgspec.msgpack.Decoder(list[int])

_U64 = (1 << 64) - 1
_GROUP_MAX = 0xFFFF

_TIERS = {"cpu_pinned": CPU, "host": CPU, "external": STORAGE}
"""SGLang's names for its host memory and for a shared pool such as Mooncake's. Any other medium keeps its own name."""

_KINDS = {
    "sliding_window": AttentionKind.SLIDING_WINDOW,
    "sliding_window_mla": AttentionKind.SLIDING_WINDOW,
    "mamba": AttentionKind.STATE,
    "encoder_only_attention": AttentionKind.IGNORED,
    "cross_attention": AttentionKind.IGNORED,
}
"""vLLM 0.32 ``KVCacheSpecKind``. All others are FULL: ``full_attention``, ``mla_attention``, ``sink_full_attention``, what this
version does not know, and ``chunked_local_attention``. The last two need at most every block, so FULL may count too few
tokens as a hit, never too many."""


def read_hashes(raw: msgspec.Raw, limits: DecodeLimits) -> tuple[EngineHash, ...]:
    """Return the block hashes. Faults: ``bad_hash``, ``oversize_event``."""
    _check_length(raw, limits.hashes_per_event_max, "block_hashes", "bad_hash")
    try:
        values = _HASHES.decode(raw)
    except UNREADABLE as error:
        raise EventFaultError("bad_hash", f"block_hashes: {explain(error)}") from error
    return tuple(engine_hash(value) for value in values)


def read_parent(raw: msgspec.Raw) -> EngineHash | None:
    """Return the parent's hash; None where the event starts a chain."""
    try:
        value = _PARENT.decode(raw)
    except UNREADABLE as error:
        raise EventFaultError("bad_hash", f"parent_block_hash: {explain(error)}") from error
    return None if value is None else engine_hash(value)


def engine_hash(value: int | bytes) -> EngineHash:
    """Return 64 bits of a hash: of an integer of either sign its bits, of a longer digest its last 8 bytes, big endian.

    That is what vLLM itself sends of a digest where it is set to integers, so both settings name a block alike.
    """
    if isinstance(value, int):
        return EngineHash(value & _U64)
    if not value:
        raise EventFaultError("bad_hash", "an empty hash")
    return EngineHash(int.from_bytes(value[-8:], "big"))


def read_tokens(raw: msgspec.Raw, limits: DecodeLimits) -> array[int]:
    """Return the token ids. Faults: ``bad_tokens``, ``oversize_event``."""
    _check_length(raw, limits.tokens_per_event_max, "token_ids", "bad_tokens")
    try:
        tokens = _TOKENS.decode(raw)
    except UNREADABLE as error:
        remedy = ""
        if "got `array`" in str(error):
            remedy = "; pairs are SGLang's keys for EAGLE, which name no single token: blocks of this engine cannot be keyed"
        raise EventFaultError("bad_tokens", f"token_ids: {explain(error)}{remedy}") from error
    try:
        return array("I", tokens)
    except OverflowError:
        position = next(i for i, token in enumerate(tokens) if not 0 <= token <= 0xFFFF_FFFF)
        raise EventFaultError("bad_tokens", f"token_ids[{position}]: {tokens[position]} is no 32-bit id") from None


def _check_length(raw: msgspec.Raw, length_max: int, field: str, reason: str) -> None:
    length = array_length(raw)
    if length is None:
        raise EventFaultError(reason, f"{field}: not an array")
    if length > length_max:
        raise EventFaultError("oversize_event", f"{field}: {length} elements; at most {length_max} are read")


def block_size(value: int | None, tokens: array[int], limits: DecodeLimits) -> int | None:
    """Return a block's size in tokens; None in a placeholder event, whose size is 0. Fault: ``bad_block_size``."""
    if value is not None and not 0 <= value <= limits.block_size_tokens_max:
        raise EventFaultError("bad_block_size", f"block_size: {value}")
    if not value and tokens:
        raise EventFaultError("bad_block_size", f"block_size: {value} with {len(tokens)} tokens")
    return value or None


def tier(medium: str | None, limits: DecodeLimits) -> Tier:
    """Return where a copy lies. No medium means the device: engines that send none have nothing else."""
    if not medium:
        return GPU
    name = (text(medium, "medium", limits) or "").lower()
    return _TIERS.get(name, cast("Tier", name))


def group(value: int | None) -> GroupIdx | None:
    if value is not None and not 0 <= value <= _GROUP_MAX:
        raise EventFaultError("bad_field", f"group_idx: {value}")
    return None if value is None else GroupIdx(value)


def group_spec(kind: str | None, window_tokens: int | None, block_size_tokens: int | None) -> GroupSpec | None:
    """Return how a group caches; None if the event tells nothing of it."""
    if kind is None and block_size_tokens is None:
        return None
    attention = _KINDS.get(kind or "", AttentionKind.FULL)
    if attention is not AttentionKind.SLIDING_WINDOW:
        return GroupSpec(attention, None, block_size_tokens)
    if window_tokens is None or window_tokens <= 0:
        return GroupSpec(AttentionKind.FULL, None, block_size_tokens)
    return GroupSpec(attention, window_tokens, block_size_tokens)


def adapter(name: str | None, lora_id: int | str | None, limits: DecodeLimits) -> str | None:
    """Return the LoRA adapter's name; ``lora:<id>`` where only its number is known; None for the base model.

    vLLM before vllm-project/vllm#27577 sends ``lora_id`` alone: an adapter's positive number in that process; None or 0 is
    the base model. A block of an adapter must not be taken for the base model's, so the number becomes a name; a query
    finds such blocks only by that name.
    """
    if name:
        return text(name, "lora_name", limits)
    return f"lora:{text(str(lora_id), 'lora_id', limits)}" if lora_id else None


def text(value: str | None, field: str, limits: DecodeLimits) -> str | None:
    if value is not None and len(value) > limits.text_bytes_max:
        raise EventFaultError("bad_field", f"{field}: {len(value)} characters; at most {limits.text_bytes_max} are read")
    return value

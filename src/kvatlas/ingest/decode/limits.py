"""How large a payload may be before it is refused."""

from __future__ import annotations

import msgspec


class DecodeLimits(msgspec.Struct, frozen=True):
    """Bounds on what one payload may say. Reaching one is an error or a fault, never a cut-off event.

    Each bound caps memory that the payload's own size does not: one byte of msgpack can become a Python object of 30 to
    150 bytes. What is left of that factor is about 15 (hashes of three bytes). A real payload of vLLM is some kilobytes.
    """

    payload_bytes_max: int = 64 << 20
    """A larger payload is refused (DecodeError ``oversize``) unread."""
    events_max: int = 1 << 18
    """Events in a payload. More: DecodeError ``oversize``. vLLM sends one removal a block, so a step that evicts counts."""
    hashes_per_event_max: int = 1 << 20
    """Block hashes in an event; in the generic format also all that are derived for a payload. More: fault
    ``oversize_event``."""
    tokens_per_event_max: int = 1 << 23
    """Tokens in an event, whose peak is 36 bytes each. More: fault ``oversize_event``. An event covers a prompt at most."""
    block_size_tokens_max: int = 1 << 20
    """A larger or negative block size is a fault (``bad_block_size``)."""
    extras_per_payload_max: int = 1 << 18
    """Extra keys in all events of a payload. Further ones: fault ``oversize_event``."""
    extra_bytes_max: int = 64 << 10
    """One extra key. Larger: fault ``oversize_event``. The largest known is a cache salt or a hash of 64 characters."""
    text_bytes_max: int = 4096
    """A medium, adapter name or session. Longer: fault ``bad_field``."""
    faults_max: int = 1000
    """Faults told one by one; the rest of a payload's are summed up in one with reason ``more_faults``."""

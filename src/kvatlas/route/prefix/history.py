"""Which blocks were routed to whom: a map from a block's hash to the endpoints that got it, and for each of them an LRU.

Endpoints are bits of a number, so that matching costs a step a block, however many endpoints there are. Both bounds evict the
block that was routed longest ago; of blocks that were routed together a prompt's last one, since a prefix is of use without its
end, and the end is not without the prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence

import msgspec

from kvatlas.route.endpoint import EndpointName

BLOCK_BYTES = 95
"""A block's hash with its endpoints. An estimate, as ENTRY_BYTES is: CPython 3.11 was seen to take 7% more to 25% less."""
ENTRY_BYTES = 215
"""A block in the LRU of one endpoint."""


class HistoryStats(msgspec.Struct, frozen=True):
    """Sizes of a history, and what it gave up."""

    endpoints: int
    blocks: int
    """Distinct ones."""
    entries: int
    """(block, endpoint) pairs."""
    bytes_estimated: int
    evicted_capacity: int
    """Entries that went because their endpoint's cache holds no more."""
    evicted_bytes: int
    """Entries that went because of the bound on all of them together."""


class History:
    """What was routed where. Not thread-safe: plugins are called under the router's lock."""

    def __init__(self, bytes_max: int) -> None:
        """``bytes_max``: of all endpoints together, as estimated. Beyond it the endpoint with most blocks loses its oldest."""
        self._bytes_max = bytes_max
        self._holders: dict[int, int] = {}
        """By hash: the bits of its endpoints. Never 0."""
        self._routed: dict[EndpointName, _Routed] = {}
        self._names: dict[int, EndpointName] = {}
        """By bit."""
        self._entries = 0
        self._evicted_capacity = 0
        self._evicted_bytes = 0

    def match(self, hashes: Sequence[int]) -> dict[EndpointName, int]:
        """Return how many leading blocks each endpoint got, of those that got any. Costs blocks + endpoints."""
        found: dict[EndpointName, int] = {}
        unbroken = self._holders.get(hashes[0], 0) if hashes else 0
        for count, block in enumerate(hashes):
            holders = self._holders.get(block, 0) & unbroken
            if holders != unbroken:
                self._reached(found, unbroken ^ holders, count)
                unbroken = holders
                if not unbroken:
                    return found
        self._reached(found, unbroken, len(hashes))
        return found

    def record(self, endpoint: EndpointName, hashes: Sequence[int], capacity_blocks: int) -> None:
        """Note that a prompt was routed to an endpoint whose cache holds so many blocks."""
        routed = self._of(endpoint)
        blocks, bit, holders = routed.blocks, routed.bit, self._holders
        before = len(blocks)
        for block in reversed(hashes[:capacity_blocks]):  # the first one last: it stays longest
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
                holders[block] = holders.get(block, 0) | bit
        self._entries += len(blocks) - before
        self._evicted_capacity += self._evict(routed, len(blocks) - capacity_blocks)
        self._shrink()

    def keep(self, endpoints: Container[EndpointName]) -> None:
        """Forget all endpoints but these. Costs the entries of those that go."""
        for endpoint in [name for name in self._routed if name not in endpoints]:
            routed = self._routed.pop(endpoint)
            self._evict(routed, len(routed.blocks))
            del self._names[routed.bit]

    def stats(self) -> HistoryStats:
        return HistoryStats(
            endpoints=len(self._routed),
            blocks=len(self._holders),
            entries=self._entries,
            bytes_estimated=self._bytes(),
            evicted_capacity=self._evicted_capacity,
            evicted_bytes=self._evicted_bytes,
        )

    def _reached(self, found: dict[EndpointName, int], bits: int, count: int) -> None:
        while bits:
            bit = bits & -bits
            found[self._names[bit]] = count
            bits ^= bit

    def _of(self, endpoint: EndpointName) -> _Routed:
        routed = self._routed.get(endpoint)
        if routed is None:
            bit = 1
            while bit in self._names:
                bit <<= 1
            routed = self._routed[endpoint] = _Routed(bit)
            self._names[bit] = endpoint
        return routed

    def _evict(self, routed: _Routed, count: int) -> int:
        """Evict an endpoint's ``count`` oldest blocks; return how many."""
        for _ in range(count):
            block, _none = routed.blocks.popitem(last=False)
            left = self._holders[block] ^ routed.bit
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]
        evicted = max(0, count)
        self._entries -= evicted
        return evicted

    def _shrink(self) -> None:
        while (excess_bytes := self._bytes() - self._bytes_max) > 0 and self._entries:
            fullest = max(self._routed.values(), key=lambda routed: len(routed.blocks))
            count = -(-excess_bytes // (BLOCK_BYTES + ENTRY_BYTES))
            self._evicted_bytes += self._evict(fullest, min(count, len(fullest.blocks)))

    def _bytes(self) -> int:
        return len(self._holders) * BLOCK_BYTES + self._entries * ENTRY_BYTES


class _Routed:
    """What was routed to one endpoint."""

    __slots__ = ("bit", "blocks")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.blocks: OrderedDict[int, None] = OrderedDict()
        """Hashes, oldest first."""

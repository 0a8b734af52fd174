"""What an engine without attention groups holds, straight from its raw events: engine hashes, copies counted, and nothing else.

It shares no code with kvatlas: msgpack to plain objects, prefixes as tuples of tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import msgspec

Prefix = tuple[str | None, tuple[int, ...]]
"""cache_salt and all tokens up to the end of a block."""

BLOCK_TOKENS = 32


class HashOracle:
    """One rank of one engine."""

    def __init__(self) -> None:
        self.hash_of: dict[Prefix, object] = {}
        self.prefix_of: dict[object, Prefix] = {}
        self.copies: dict[str, Counter[object]] = defaultdict(Counter)

    def feed(self, payload: bytes) -> None:
        for event in msgspec.msgpack.decode(payload)[1]:
            if event["type"] == "AllBlocksCleared":
                self.copies["GPU"].clear()
            elif event["type"] == "BlockRemoved":
                self.copies[event["medium"]].subtract(event["block_hashes"])
            else:
                self._learn(event)
                self.copies[event["medium"]].update(event["block_hashes"])

    def _learn(self, event: dict) -> None:
        tokens, hashes = event["token_ids"], event["block_hashes"]
        if not tokens:
            return
        parent = event["parent_block_hash"]
        if parent is not None and parent not in self.prefix_of:
            return
        salt, before = self.prefix_of.get(parent, (None, ()))
        if parent is None and event.get("extra_keys") and event["extra_keys"][0]:
            salt = event["extra_keys"][0][0]
        for i, block in enumerate(hashes):
            before = (*before, *tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS])
            self.prefix_of[block] = (salt, before)
            self.hash_of[salt, before] = block

    def cached_tokens(self, prompt: list[int], salt: str | None) -> int:
        hit = 0
        while hit + BLOCK_TOKENS < len(prompt):
            block = self.hash_of.get((salt, tuple(prompt[: hit + BLOCK_TOKENS])))
            if block is None or not any(copies[block] > 0 for copies in self.copies.values()):
                break
            hit += BLOCK_TOKENS
        return hit

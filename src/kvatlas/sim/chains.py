"""Tokens to the keys of their blocks. Without the native core, where prompts share beginnings what was hashed is remembered."""

from __future__ import annotations

from array import array
from collections import OrderedDict

from kvatlas.keys import ChainEnd, KeySchema
from kvatlas.keys.fast import native_block_keys

HEAD_TOKENS = 64
"""Prompts that begin with the same so many tokens are taken to share more."""
REMEMBERED_BYTES = 64 << 20

Name = int | bytes
Known = tuple[bytes, "array[int]"]
"""The tokens of whole blocks as bytes, and their keys."""


class Chains:
    """Keys of prompts with their answers, by the project's own key chain (KeySchema without a seed)."""

    def __init__(self, block_size_tokens: int, model: str, remembered_bytes: int = REMEMBERED_BYTES) -> None:
        self._schema = KeySchema(block_size_tokens)
        self._root = self._schema.root(model)
        self._root_bytes = self._root.key.to_bytes(8, "big")
        self._block_bytes = 4 * block_size_tokens
        self._known: OrderedDict[Name, Known] = OrderedDict()
        self._bytes = 0
        self._bytes_max = remembered_bytes

    def keys(self, tokens: array[int], session: int | None = None) -> array[int]:
        """Return array('Q'): the key of every whole block.

        ``session``: whose next prompt will begin with these tokens. What a session had last is remembered, and of other prompts
        what those with equal heads have in common.
        """
        if native_block_keys is not None:  # faster than to find out what is known
            schema = self._schema
            return native_block_keys(schema.mode, self._root_bytes, tokens, schema.block_size_tokens, ())
        data = tokens.tobytes()
        head = data[: 4 * HEAD_TOKENS]
        if session is not None:
            known = self._known.get(session) or self._known.get(head)
            keys, _ = self._extended(known, data, tokens)
            self._remember(session, data, keys)
            return keys
        known = self._known.get(head)
        keys, shared = self._extended(known, data, tokens)
        if known is None:
            self._remember(head, data, keys)
        elif shared < len(known[1]):
            self._remember(head, data, keys[:shared])
        else:
            self._known.move_to_end(head)
        return keys

    def _extended(self, known: Known | None, data: bytes, tokens: array[int]) -> tuple[array[int], int]:
        """Return all keys, and how many of them were known."""
        shared = 0 if known is None else self._shared_blocks(known, data)
        if known is None or not shared:
            return array("Q", self._schema.extend(self._root, tokens)[0]), 0
        keys = known[1][:shared]
        behind = tokens[shared * self._schema.block_size_tokens :]
        return keys + array("Q", self._schema.extend(ChainEnd(keys[-1]), behind)[0]), shared

    def _shared_blocks(self, known: Known, data: bytes) -> int:
        before, keys = known
        if data.startswith(before):
            return len(keys)
        size = self._block_bytes
        low, high = 0, min(len(keys), len(data) // size)
        while low < high:
            middle = (low + high + 1) // 2
            if before[low * size : middle * size] == data[low * size : middle * size]:
                low = middle
            else:
                high = middle - 1
        return low

    def _remember(self, name: Name, data: bytes, keys: array[int]) -> None:
        old = self._known.pop(name, None)
        self._bytes -= 0 if old is None else len(old[0])
        if not keys:
            return
        data = data[: len(keys) * self._block_bytes]
        self._known[name] = (data, keys[:])
        self._bytes += len(data)
        while self._bytes > self._bytes_max:
            _, (gone, _) = self._known.popitem(last=False)
            self._bytes -= len(gone)

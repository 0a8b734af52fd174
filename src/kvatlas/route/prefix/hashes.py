"""A prompt as chained hashes of its blocks, the last one cut where the prompt ends: what routing history is kept by.

    h_{-1} = XXH64( model || cache_salt )
    h_i    = XXH64( LE64(XXH64(content of block i)) || LE64(h_{i-1}) )

The content is LE32 of each token. Where tokens are not known it is the text in UTF-8, four bytes in place of a token, zeros
behind its end. Source: llm-d-router, prefixhash and the estimate tokenizer. Equal to those but for an adapter, which is a part
of the root here, and for images, which are a part of the blocks where they start.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence

import msgspec
import xxhash

from kvatlas.keys.chain import little_endian
from kvatlas.route.prefix.native import PieceHashes, native_piece_hashes
from kvatlas.route.request import RouteRequest
from kvatlas.types import MultimodalItem

_BYTES_PER_TOKEN = 4


class HashedPrompt(msgspec.Struct, frozen=True, gc=False):
    """The hashes of a prompt's blocks, as far as they are matched, and what they stand for."""

    hashes: array[int]
    """array('Q')."""
    block_size_tokens: int
    length: int
    """Tokens that are hashed; for a text, pieces of four bytes."""
    tokens_per_piece: float = 1.0
    """Below or above 1 for a text of which is known about how many tokens it has."""

    def tokens(self, blocks: int) -> int:
        """Return how many of the prompt's tokens the first ``blocks`` are."""
        return round(min(blocks * self.block_size_tokens, self.length) * self.tokens_per_piece)


def hash_prompt(
    request: RouteRequest, block_size_tokens: int, blocks_max: int | None, *, natively: bool = True
) -> HashedPrompt | None:
    """Return the hashes of a prompt's first ``blocks_max`` blocks (None: of all); None where neither tokens nor text are known.

    Of tokens that go on beyond what is known only whole blocks are hashed: the prompt does not end there. ``natively``: in
    Rust, where the native core is installed.
    """
    chain = native_piece_hashes if natively and native_piece_hashes is not None else piece_hashes
    if request.token_ids is not None:
        return _hash_tokens(request, request.token_ids, block_size_tokens, blocks_max, chain)
    if request.text is not None:
        return _hash_text(request, request.text, block_size_tokens, blocks_max, chain)
    return None


def piece_hashes(content: memoryview, piece_bytes: int, root: int, added: Mapping[int, bytes]) -> array[int]:
    """Return array('Q'): the chained hashes of the pieces of ``content``.

    ``added``: what a piece has besides, by where it starts.
    """
    digest, pack = xxhash.xxh64_intdigest, struct.Struct("<QQ").pack  # local: this runs for every block of every prompt
    hashes = array("Q")
    last = root
    for start in range(0, len(content), piece_bytes):
        piece = content[start : start + piece_bytes]
        own = digest(bytes(piece) + added[start]) if start in added else digest(piece)
        last = digest(pack(own, last))
        hashes.append(last)
    return hashes


def _hash_tokens(
    request: RouteRequest, tokens: array[int], size: int, blocks_max: int | None, chain: PieceHashes
) -> HashedPrompt:
    length = len(tokens) if request.tokens_complete else len(tokens) - len(tokens) % size
    if blocks_max is not None:
        length = min(length, blocks_max * size)
    content = memoryview(little_endian(tokens)).cast("B")[: length * _BYTES_PER_TOKEN]
    items = _items_by_block(request.multimodal, length, size)
    return HashedPrompt(chain(content, size * _BYTES_PER_TOKEN, _root(request), items), size, length)


def _hash_text(request: RouteRequest, text: str, size: int, blocks_max: int | None, chain: PieceHashes) -> HashedPrompt:
    content = text.encode("utf-8", "surrogatepass")
    content += bytes(-len(content) % _BYTES_PER_TOKEN)
    pieces = len(content) // _BYTES_PER_TOKEN
    length = pieces if blocks_max is None else min(pieces, blocks_max * size)
    root = _root(request, [item.hash for item in request.multimodal])  # where they are in the text is not known
    hashes = chain(memoryview(content)[: length * _BYTES_PER_TOKEN], size * _BYTES_PER_TOKEN, root, {})
    known = request.prompt_tokens_estimated
    return HashedPrompt(hashes, size, length, known / pieces if known and pieces else 1.0)


def _root(request: RouteRequest, items: Sequence[str] = ()) -> int:
    adapter = [request.lora_name] if request.lora_name and request.lora_name != request.model else []
    parts = [request.model + (request.cache_salt or ""), *adapter, *items]
    return xxhash.xxh64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass"))


def _items_by_block(items: Sequence[MultimodalItem], length: int, size: int) -> dict[int, bytes]:
    """Return what the items that start in a block add to its content, by the offset of the block in bytes."""
    found: dict[int, bytes] = {}
    for item in items:
        if 0 <= item.offset_tokens < length:
            start = item.offset_tokens // size * size
            value = item.hash.encode("utf-8", "surrogatepass")
            added = (item.offset_tokens - start).to_bytes(4, "little") + len(value).to_bytes(4, "little") + value
            found[start * _BYTES_PER_TOKEN] = found.get(start * _BYTES_PER_TOKEN, b"") + added
    return found

"""A prefix store of fixed chunks of text, found by a chain of digests."""

from __future__ import annotations

import hashlib
import secrets
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict

from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.stores import Known, StoreStats

TOKEN_BYTES = array("I").itemsize
CHUNK_BYTES = 330
"""What a chunk costs without its tokens: key, slot in the order of use, object, serials.
tests/unit/tokens/test_stores.py measures it."""


class _Chunk:
    """Tokens that end in a chunk. They hold only behind the chunk whose serial is ``after``.

    ``kept``: how many tokens of the chunks before stay. It is less than there are where the text that brought this chunk had
    other tokens at the end of the chunk before than the text that had brought that one; ``token_ids`` then begins with the
    right ones. Ends are counted from the text's start, which a chunk's place fixes, so that nothing is added up on reading.
    """

    __slots__ = ("after", "ends", "kept", "serial", "space", "token_ids")

    def __init__(self, space: str, serial: int, after: int, kept: int, token_ids: bytes, ends: bytes) -> None:
        self.space = space
        self.serial = serial
        self.after = after
        self.kept = kept
        self.token_ids = token_ids
        self.ends = ends

    @property
    def size_bytes(self) -> int:
        return CHUNK_BYTES + 2 * len(self.token_ids)


class ChunkStore:
    """Knows texts by whole chunks of ``chunk_chars`` characters; a text's last characters that fill no chunk are not kept.

    A chunk's key is a digest (BLAKE2b, 16 bytes, keyed at random for each store) of the space and all text up to the chunk's
    end, so that nobody can choose a text that is taken for another one. The text itself is not kept.
    """

    def __init__(self, bytes_max: int, chunk_chars: int = 256) -> None:
        if bytes_max < 1 or chunk_chars < 1:
            raise ValueError(f"bytes_max and chunk_chars must be at least 1, not {bytes_max} and {chunk_chars}")
        self._bytes_max = bytes_max
        self._chunk_chars = chunk_chars
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()  # last used last
        self._serial = 0
        self._tokens = 0
        self._bytes = 0
        self._evicted = 0

    def find(self, space: str, text: str) -> Known:
        size = self._chunk_chars
        digest = self._begin(space)
        keys: list[bytes] = []
        token_ids: list[bytes] = []
        ends: list[bytes] = []
        count = after = 0
        with self._lock:
            chunks = self._chunks
            for start in range(0, len(text) - size + 1, size):
                digest.update(text[start : start + size].encode("utf-8", "surrogatepass"))
                key = digest.copy().digest()
                chunk = chunks.get(key)
                if chunk is None or chunk.after != after:
                    break
                if chunk.kept != count:  # most chains fit together as they are, and are joined once
                    token_ids = [b"".join(token_ids)[: chunk.kept * TOKEN_BYTES]]
                    ends = [b"".join(ends)[: chunk.kept * TOKEN_BYTES]]
                token_ids.append(chunk.token_ids)
                ends.append(chunk.ends)
                count = chunk.kept + len(chunk.token_ids) // TOKEN_BYTES
                keys.append(key)
                after = chunk.serial
            self._use(keys)
        return Known(_array(b"".join(token_ids)), _array(b"".join(ends)), len(keys) * size)

    def add(self, space: str, text: str, encoding: Encoding) -> None:
        size = self._chunk_chars
        token_ids, ends = encoding.token_ids.tobytes(), encoding.ends.tobytes()
        digest = self._begin(space)
        keys: list[bytes] = []
        after = 0
        own_bytes = 0
        held = 0  # the first `held` tokens of the chain are this text's too
        with self._lock:
            for start in range(0, len(text) - size + 1, size):
                digest.update(text[start : start + size].encode("utf-8", "surrogatepass"))
                key = digest.copy().digest()
                chunk = self._chunks.get(key)
                upto = bisect_right(encoding.ends, start + size, held)
                if chunk is None or chunk.after != after or chunk.kept > held:
                    new = self._chunk(space, after, held, token_ids, ends, upto)
                    self._put(key, new)
                    chunk, held = new, upto
                else:
                    # A chunk that another text brought: what it shares with this one counts, what differs the next chunk mends.
                    ours = slice(chunk.kept * TOKEN_BYTES, upto * TOKEN_BYTES)
                    if chunk.token_ids == token_ids[ours] and chunk.ends == ends[ours]:
                        held = upto
                    else:
                        held = chunk.kept + _shared(chunk, token_ids[ours], ends[ours])
                own_bytes += chunk.size_bytes
                if own_bytes > self._bytes_max:
                    break
                keys.append(key)
                after = chunk.serial
            self._use(keys)
            while self._bytes > self._bytes_max:
                self._drop(next(iter(self._chunks)))
                self._evicted += 1

    def stats(self) -> StoreStats:
        with self._lock:
            entries = len(self._chunks)
            return StoreStats(entries, entries * self._chunk_chars, self._tokens, self._bytes, self._evicted)

    def forget(self, space: str) -> None:
        with self._lock:
            for key in [key for key, chunk in self._chunks.items() if chunk.space == space]:
                self._drop(key)

    def _begin(self, space: str) -> hashlib.blake2b:
        name = space.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(len(name).to_bytes(8, "little") + name, digest_size=16, key=self._secret)

    def _chunk(self, space: str, after: int, kept: int, token_ids: bytes, ends: bytes, upto: int) -> _Chunk:
        self._serial += 1
        ours = slice(kept * TOKEN_BYTES, upto * TOKEN_BYTES)
        return _Chunk(space, self._serial, after, kept, token_ids[ours], ends[ours])

    def _use(self, keys: list[bytes]) -> None:
        """Count a chain as used now; its end goes first, since a chunk is of no use without those before it."""
        move = self._chunks.move_to_end
        for key in reversed(keys):
            move(key)

    def _put(self, key: bytes, chunk: _Chunk) -> None:
        if key in self._chunks:
            self._drop(key)
        self._chunks[key] = chunk
        self._tokens += len(chunk.token_ids) // TOKEN_BYTES
        self._bytes += chunk.size_bytes

    def _drop(self, key: bytes) -> None:
        chunk = self._chunks.pop(key)
        self._tokens -= len(chunk.token_ids) // TOKEN_BYTES
        self._bytes -= chunk.size_bytes


def _shared(chunk: _Chunk, token_ids: bytes, ends: bytes) -> int:
    """Count the leading tokens that a chunk has in common with others."""
    theirs = zip(_array(chunk.token_ids), _array(chunk.ends), strict=True)
    count = 0
    for mine, other in zip(zip(_array(token_ids), _array(ends), strict=True), theirs, strict=False):
        if mine != other:
            break
        count += 1
    return count


def _array(data: bytes) -> array[int]:
    values = array("I")
    values.frombytes(data)
    return values

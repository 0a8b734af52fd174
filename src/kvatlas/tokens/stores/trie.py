"""A prefix store as a compressed tree over text: common prefixes to the character."""

from __future__ import annotations

import heapq
import sys
import threading
from array import array
from bisect import bisect_right

from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.stores import Known, StoreStats

NODE_BYTES = 500
"""What a node costs without its text and tokens: object, dict of children, places in the parent and in the queue.
tests/unit/tokens/test_stores.py measures it."""
INNER_BYTES = 170
"""What it costs more as soon as it has a child."""


class _Node:
    """An edge's text, and the tokens that end in it.

    ``kept``: how many tokens of the path before stay. It is less than there are where the text that brought this node had other
    tokens just before it than the text that had brought the path; ``token_ids`` then begins with the right ones.
    """

    __slots__ = ("children", "edge", "ends", "kept", "parent", "queued", "size_bytes", "token_ids", "used")

    def __init__(self, parent: _Node | None, edge: str, kept: int, token_ids: array[int], ends: array[int]) -> None:
        self.parent = parent
        self.edge = edge
        self.kept = kept
        self.token_ids = token_ids
        self.ends = ends
        self.children: dict[str, _Node] = {}
        self.used = 0
        self.queued = False
        self.size_bytes = 0
        self.measure()

    def measure(self) -> None:
        own = NODE_BYTES + (INNER_BYTES if self.children else 0)
        self.size_bytes = own + sys.getsizeof(self.edge) + 2 * self.token_ids.itemsize * len(self.token_ids)


class TrieStore:
    """Knows texts to the character, and keeps them: memory grows with text as well as with tokens."""

    def __init__(self, bytes_max: int) -> None:
        if bytes_max < 1:
            raise ValueError(f"bytes_max must be at least 1, not {bytes_max}")
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._roots: dict[str, _Node] = {}
        self._leaves: list[tuple[int, int, _Node]] = []  # heap: (used when queued, tie, node); looked at again when it comes up
        self._ties = 0
        self._tick = 0
        self._entries = 0
        self._chars = 0
        self._tokens = 0
        self._bytes = 0
        self._evicted = 0

    def find(self, space: str, text: str) -> Known:
        with self._lock:
            root = self._roots.get(space)
            if root is None:
                return Known(array("I"), array("I"), 0)
            path, node, _, chars = self._walk(root, text)
            token_ids, ends = _tokens(path)
            if node is not None:
                cut = bisect_right(node.ends, chars)
                del token_ids[node.kept :], ends[node.kept :]
                token_ids.extend(node.token_ids[:cut])
                ends.extend(node.ends[:cut])
            return Known(token_ids, ends, chars)

    def add(self, space: str, text: str, encoding: Encoding) -> None:
        if not text:
            return
        with self._lock:
            root = self._roots.get(space)
            if root is None:
                root = self._roots[space] = _Node(None, "", 0, array("I"), array("I"))
            path, node, shared, chars = self._walk(root, text)
            if chars < len(text):
                if node is not None:
                    path.append(self._split(node, shared, chars))
                held = _held(path, encoding)
                rest = _Node(path[-1], text[chars:], held, encoding.token_ids[held:], encoding.ends[held:])
                if rest.size_bytes <= self._bytes_max:
                    rest.used = self._tick
                    self._join(rest)
            self._evict()
            self._tidy()

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(self._entries, self._chars, self._tokens, self._bytes, self._evicted)

    def forget(self, space: str) -> None:
        with self._lock:
            root = self._roots.pop(space, None)
            nodes = list(root.children.values()) if root is not None else []
            while nodes:
                node = nodes.pop()
                nodes.extend(node.children.values())
                self._count(node, -1)
                node.parent = None
                node.children = {}
            self._tidy(always=True)

    def _walk(self, root: _Node, text: str) -> tuple[list[_Node], _Node | None, int, int]:
        """Follow a text, and count what it passes as used.

        Returns the nodes passed in full, from the root; the node left within its edge, if any, and how far into it; characters.
        """
        self._tick += 1
        path = [root]
        chars = 0
        while chars < len(text):
            node = path[-1].children.get(text[chars])
            if node is None:
                break
            node.used = self._tick
            if text.startswith(node.edge, chars):
                path.append(node)
                chars += len(node.edge)
            else:
                shared = _shared(node.edge, text, chars)
                return path, node, shared, chars + shared
        return path, None, 0, chars

    def _split(self, node: _Node, shared: int, chars: int) -> _Node:
        """Cut a node's edge in two, its tokens by where they end; returns the upper half."""
        parent = node.parent
        assert parent is not None
        self._count(node, -1)
        cut = bisect_right(node.ends, chars)
        upper = _Node(parent, node.edge[:shared], node.kept, node.token_ids[:cut], node.ends[:cut])
        upper.used = node.used
        node.edge = node.edge[shared:]
        node.kept += cut
        node.token_ids, node.ends = node.token_ids[cut:], node.ends[cut:]
        node.measure()
        node.parent = upper
        upper.children[node.edge[0]] = node
        upper.measure()
        parent.children[upper.edge[0]] = upper
        self._count(upper, 1)
        self._count(node, 1)
        return upper

    def _join(self, leaf: _Node) -> None:
        assert leaf.parent is not None
        leaf.parent.children[leaf.edge[0]] = leaf
        self._count(leaf, 1)
        self._measure(leaf.parent)
        self._queue(leaf)

    def _queue(self, leaf: _Node) -> None:
        self._ties += 1
        leaf.queued = True
        heapq.heappush(self._leaves, (leaf.used, self._ties, leaf))

    def _count(self, node: _Node, sign: int) -> None:
        self._entries += sign
        self._chars += sign * len(node.edge)
        self._tokens += sign * len(node.token_ids)
        self._bytes += sign * node.size_bytes

    def _measure(self, node: _Node) -> None:
        """Count a node's bytes again, since its first child came or its last one went. Roots are not counted."""
        if node.parent is not None:
            self._bytes -= node.size_bytes
            node.measure()
            self._bytes += node.size_bytes

    def _evict(self) -> None:
        """Drop the leaves used longest ago until the bound holds. Parents are used no earlier than their children."""
        while self._bytes > self._bytes_max and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            parent = node.parent
            if parent is None or node.children:
                continue  # forgotten, or no leaf any more: queued again when it becomes one
            if node.used != used:
                self._queue(node)
                continue
            del parent.children[node.edge[0]]
            node.parent = None
            self._count(node, -1)
            self._evicted += 1
            self._measure(parent)
            if parent.parent is not None and not parent.children and not parent.queued:
                self._queue(parent)

    def _tidy(self, *, always: bool = False) -> None:
        """Let go of queued nodes that are no leaves any more, once they are more than half of the queue."""
        if always or len(self._leaves) > 2 * self._entries + 64:
            self._leaves = [item for item in self._leaves if item[2].parent is not None]
            heapq.heapify(self._leaves)
        for space in [space for space, root in self._roots.items() if not root.children]:
            del self._roots[space]


def _tokens(path: list[_Node]) -> tuple[array[int], array[int]]:
    token_ids, ends = array("I"), array("I")
    for node in path:
        if node.kept != len(token_ids):
            del token_ids[node.kept :], ends[node.kept :]
        token_ids.extend(node.token_ids)
        ends.extend(node.ends)
    return token_ids, ends


def _held(path: list[_Node], encoding: Encoding) -> int:
    """Count the leading tokens that a path has in common with a text that passes it."""
    token_ids, ends = _tokens(path)
    high = min(len(token_ids), len(encoding.token_ids))
    if token_ids[:high] == encoding.token_ids[:high] and ends[:high] == encoding.ends[:high]:
        return high
    low = 0  # the first `low` are equal; not all of the first `high` are
    while high - low > 1:
        middle = (low + high) // 2
        if token_ids[low:middle] == encoding.token_ids[low:middle] and ends[low:middle] == encoding.ends[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _shared(edge: str, text: str, start: int) -> int:
    """Count the leading characters that an edge shares with a text from ``start`` on; the edge is not all there."""
    low, high = 1, min(len(edge), len(text) - start)
    if text.startswith(edge[:high], start):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if text.startswith(edge[low:middle], start + low):
            low = middle
        else:
            high = middle
    return low

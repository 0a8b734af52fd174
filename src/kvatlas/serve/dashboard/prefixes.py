"""The hottest prefixes, as a tree: bounded, sampled, and forgetting. Knows block keys alone, and so no prompt.

    offer(model, keys, held)    about a microsecond for a request: it is put into a box of the last SAMPLES_MAX
    fold()                      every step: what is in the box goes into the tree, what is cold goes out
    top(count)                  the hottest nodes, with those above them

Block keys are chained: where two chains have the same key at some place, they are equal up to there. So how much two prompts
have in common is found by bisection, and a path is as many blocks as requests went through together (a radix tree).
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from kvatlas.keys import shared_blocks
from kvatlas.types import BlockKey

SAMPLES_MAX = 128
"""Requests looked at between two folds; of more, the latest, and each counts for several."""
CHAIN_BLOCKS_MAX = 2048
"""Of a longer prompt the beginning is looked at."""
NODES_MAX = 1024
KEYS_MAX = 1 << 17
"""Block keys in the whole tree: 1 MiB, and while a box is folded in 2 MiB more."""
HALF_LIFE_S = 300.0
WEIGHT_MIN = 0.05
"""A node of which less is left is dropped: a single request, after 20 minutes."""
SHOWN_MIN = 1.5
"""A prefix is shown where about this many requests came through it of late."""


class Prefix(msgspec.Struct, frozen=True):
    """One node as it is shown: a run of blocks that requests had in common."""

    id: int
    parent: int | None
    model: str
    key: BlockKey
    """Of its last block."""
    start_blocks: int
    end_blocks: int
    """How deep it goes: blocks from the prompt's beginning."""
    requests: float
    """About how many came through of late: older ones count less, half after HALF_LIFE_S."""
    held_blocks: float
    """Blocks of it that these requests found held by the best holder, in sum."""


class HotPrefixes:
    """Any thread may offer; one at a time folds and looks."""

    def __init__(self) -> None:
        self._box: deque[tuple[str, Sequence[BlockKey], int]] = deque(maxlen=SAMPLES_MAX)
        self._offered = 0
        self._lock = threading.Lock()
        self._roots: dict[str, _Node] = {}
        self._nodes = 0
        self._keys = 0

    def offer(self, model: str, keys: Sequence[BlockKey], held_blocks: int) -> None:
        """Note a request: its model, its block keys (kept until folded), and how many of them the best holder has."""
        if len(keys) > CHAIN_BLOCKS_MAX:
            keys = keys[:CHAIN_BLOCKS_MAX]
        with self._lock:
            self._offered += 1
            self._box.append((model, keys, held_blocks))

    def fold(self, seconds: float) -> None:
        """Take in what was offered; ``seconds`` passed since the last time."""
        with self._lock:
            box, offered = list(self._box), self._offered
            self._box.clear()
            self._offered = 0
        self._cool(0.5 ** (seconds / HALF_LIFE_S))
        for model, keys, held_blocks in box:
            if len(keys) > 0:
                self._insert(model, array("Q", keys), held_blocks, offered / len(box))
        if self._nodes > NODES_MAX or self._keys > KEYS_MAX:
            self._prune()

    def top(self, count: int) -> list[Prefix]:
        """Return the nodes with most requests times blocks, at most ``count``, parents before children, the hottest first."""
        warm = [(model, node) for model, root in self._roots.items() for node in root.below() if node.requests >= SHOWN_MIN]
        warm.sort(key=lambda item: -item[1].requests * len(item[1].run))
        chosen: dict[int, tuple[str, _Node]] = {}
        for model, node in warm:
            path = [one for one in node.path() if id(one) not in chosen]
            if len(chosen) + len(path) <= count:
                chosen.update((id(one), (model, one)) for one in path)
        numbers = {key: number for number, key in enumerate(chosen)}
        return [_shown(model, node, numbers) for model, node in chosen.values()]

    def _insert(self, model: str, keys: array[int], held_blocks: int, weight: float) -> None:
        root = self._roots.get(model)
        if root is None:
            root = self._roots[model] = _Node(None, 0, array("Q"))
        node, depth = root, 0
        while depth < len(keys):
            child = node.children.get(keys[depth])
            if child is None:
                child = _Node(node, depth, keys[depth:])
                node.children[keys[depth]] = child
                self._nodes += 1
                self._keys += len(child.run)
            elif (common := shared_blocks(child.run, keys, depth)) < len(child.run):
                child = child.split(common)
                self._nodes += 1
            node, depth = child, child.end
            node.requests += weight
            node.held += weight * max(0, min(held_blocks, node.end) - node.start)

    def _cool(self, factor: float) -> None:
        for model, root in list(self._roots.items()):
            for node in list(root.below()):
                node.requests *= factor
                node.held *= factor
                if node.requests < WEIGHT_MIN:
                    self._drop(node)
            if not root.children:
                del self._roots[model]

    def _prune(self) -> None:
        """Drop the coldest leaves until three quarters of what is allowed are left."""
        while self._nodes > NODES_MAX * 3 // 4 or self._keys > KEYS_MAX * 3 // 4:
            leaves = [node for root in self._roots.values() for node in root.below() if not node.children]
            if not leaves:
                return
            leaves.sort(key=lambda node: node.requests)
            for leaf in leaves:
                self._drop(leaf)
                if self._nodes <= NODES_MAX * 3 // 4 and self._keys <= KEYS_MAX * 3 // 4:
                    return

    def _drop(self, node: _Node) -> None:
        """Take a node out, with all below it."""
        if node.parent is None or node.parent.children.get(node.run[0]) is not node:
            return  # it went with one above it
        del node.parent.children[node.run[0]]
        for one in (node, *node.below()):
            self._nodes -= 1
            self._keys -= len(one.run)


class _Node:
    __slots__ = ("children", "held", "parent", "requests", "run", "start")

    def __init__(self, parent: _Node | None, start: int, run: array[int]) -> None:
        self.parent = parent
        self.start = start
        self.run = run
        self.children: dict[int, _Node] = {}
        self.requests = 0.0
        self.held = 0.0

    @property
    def end(self) -> int:
        return self.start + len(self.run)

    def split(self, blocks: int) -> _Node:
        """Put a node of the first ``blocks`` above this one; return it."""
        assert self.parent is not None
        upper = _Node(self.parent, self.start, self.run[:blocks])
        share = self.held / (self.requests or 1.0)  # blocks held of each request: of the first ones, that is as many as fit
        upper.requests, upper.held = self.requests, self.requests * min(share, blocks)
        self.held = self.requests * max(0.0, share - blocks)
        self.parent.children[self.run[0]] = upper
        self.parent, self.start, self.run = upper, self.start + blocks, self.run[blocks:]
        upper.children[self.run[0]] = self
        return upper

    def below(self) -> Iterator[_Node]:
        """Yield all nodes below, parents first."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def path(self) -> list[_Node]:
        """Return the nodes from the top down to this one, without the root."""
        found: list[_Node] = []
        node: _Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def _shown(model: str, node: _Node, numbers: dict[int, int]) -> Prefix:
    return Prefix(
        id=numbers[id(node)],
        parent=numbers.get(id(node.parent)),
        model=model,
        key=BlockKey(node.run[-1]),
        start_blocks=node.start,
        end_blocks=node.end,
        requests=round(node.requests, 2),
        held_blocks=round(node.held, 1),
    )

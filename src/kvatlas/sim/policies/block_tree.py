"""A radix tree of prompts in blocks, and numbers that engines have on its nodes: what some peers keep of requests.

Keys are chained, so one key stands for all before it: two runs that agree in a key agree up to there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from kvatlas.keys import shared_blocks

_NOTHING: array[int] = array("Q")


class Node:
    """A run of blocks behind its parent's. Whoever is here is also at its parent."""

    __slots__ = ("children", "creator", "held", "parent", "run")

    def __init__(self, run: array[int], parent: Node | None, creator: int) -> None:
        self.run = run
        self.parent = parent
        self.creator = creator
        """The engine for which it was made."""
        self.held: dict[int, int] = {}
        """By engine, a number that means what the tree's owner likes."""
        self.children: dict[int, Node] = {}
        """By the first key of their run."""

    def is_leaf_of(self, engine: int) -> bool:
        """Whether an engine that is here is at none of the children."""
        return not any(engine in child.held for child in self.children.values())


class BlockTree:
    """Prompts by their beginnings."""

    def __init__(self) -> None:
        self.root = Node(_NOTHING, None, -1)

    def match(self, keys: Sequence[int]) -> Iterator[tuple[Node, int]]:
        """Yield the nodes on a prompt's way, each with how many blocks of its run the prompt has: all, but for the last one."""
        node, at = self.root, 0
        while at < len(keys) and (child := node.children.get(keys[at])) is not None:
            shared = shared_blocks(child.run, keys, at)
            yield child, shared
            if shared < len(child.run):
                return
            node, at = child, at + shared

    def grow(self, keys: array[int], creator: int) -> list[Node]:
        """Return the nodes that make up a prompt exactly; what is missing is made for ``creator``, with nobody there."""
        nodes: list[Node] = []
        node, at = self.root, 0
        for child, shared in list(self.match(keys)):
            node = child if shared == len(child.run) else self._split(child, shared)
            nodes.append(node)
            at += shared
        if at < len(keys):
            new = Node(keys[at:], node, creator)
            node.children[keys[at]] = new
            nodes.append(new)
        return nodes

    def prune(self, node: Node) -> None:
        """Take away a node where nobody is, and those above it that are left without anybody."""
        while node.parent is not None and not node.held and not node.children:
            del node.parent.children[node.run[0]]
            node = node.parent

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes but the root."""
        stack = [*self.root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _split(self, lower: Node, at: int) -> Node:
        assert lower.parent is not None
        upper = Node(lower.run[:at], lower.parent, lower.creator)
        upper.held = dict(lower.held)
        upper.children = {lower.run[at]: lower}
        lower.parent.children[upper.run[0]] = upper
        lower.run = lower.run[at:]
        lower.parent = upper
        return upper

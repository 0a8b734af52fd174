"""``sglang-cache-aware``: the policy ``cache_aware`` of SGLang's router."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable

from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.policies.block_tree import BlockTree, Node
from kvatlas.sim.policies.light import InFlight
from kvatlas.sim.policies.policy import Surroundings
from kvatlas.sim.request import Request

CHARS_A_TOKEN = 4
"""The tree is of text there and of blocks here; its size is bounded in characters."""


class CacheAware(InFlight):
    """Who got most of a prompt before, while loads are even; else who has the fewest requests.

    - Loads are uneven where ``max - min > balance_abs_threshold`` and ``max > min * balance_rel_threshold``: the least loaded
      gets the request, the first of several.
    - Else the longest prefix in one radix tree of all that was sent: where more than ``cache_threshold`` of the prompt matches,
      it goes to the engine for which the node where the match ends was made first; otherwise to the least loaded one.
    - The tree learns each request. Every ``eviction_interval_s`` each engine's least recently sent leaves go, until it has at
      most ``max_tree_size`` characters.

    Source: sgl-project/sglang, sgl-model-gateway/src/policies/cache_aware.rs (053b63f) and tree.rs (03744db); defaults of
    bindings/python/src/sglang_router/router_args.py: 0.3, 64, 1.5, 120 s, 2^26. (sgl-router, before it, sent a prompt that
    matched too little to the smallest tree.) vllm-project/router, src/policies/cache_aware.rs (16917f4), has the same rule and
    defaults. Other than there, prompts are compared in whole blocks, not in characters, and a match alone never renews a leaf
    (there one match in eight does).
    """

    name = "sglang-cache-aware"

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        eviction_interval_s: float = 120.0,
        max_tree_size: int = 1 << 26,
    ) -> None:
        super().__init__(surroundings)
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs_threshold
        self._balance_rel = balance_rel_threshold
        self._size = surroundings.block_size_tokens
        self._blocks_max = max_tree_size // (CHARS_A_TOKEN * self._size)
        self._evict_every_s = eviction_interval_s
        self._evict_s = eviction_interval_s
        self._clock: Callable[[], float] = surroundings.clock
        self._tree = BlockTree()
        self._epoch = itertools.count(1)
        self.blocks: dict[int, int] = {}
        """In the tree, by engine."""

    def joins(self, engine: int, spec: EngineSpec) -> None:
        super().joins(engine, spec)
        self.blocks[engine] = 0

    def leaves(self, engine: int) -> None:
        super().leaves(engine)
        for node in list(self._tree.nodes()):
            node.held.pop(engine, None)
            self._tree.prune(node)
        del self.blocks[engine]

    def pick(self, request: Request) -> int:
        if self._clock() >= self._evict_s:
            self._evict_s = self._clock() + self._evict_every_s
            self.evict(self._blocks_max)
        keys = request.keys[: request.prompt_blocks]
        low, high = min(self.loads.values()), max(self.loads.values())
        engine = next(engine for engine, load in self.loads.items() if load == low)
        if not (high - low > self._balance_abs and high > low * self._balance_rel):
            engine = self._by_prefix(keys, request.arrival.prompt_tokens, engine)
        self._learn(keys, engine)
        return engine

    def _by_prefix(self, keys: array[int], prompt_tokens: int, otherwise: int) -> int:
        blocks, last = 0, None
        for node, shared in self._tree.match(keys):
            blocks += shared
            last = node
        if last is None or not blocks * self._size / prompt_tokens > self._cache_threshold:
            return otherwise
        return last.creator if last.creator in last.held else next(iter(last.held))

    def _learn(self, keys: array[int], engine: int) -> None:
        nodes = self._tree.grow(keys, engine)
        for node in nodes:
            if engine not in node.held:
                node.held[engine] = 0
                self.blocks[engine] += len(node.run)
        if nodes:
            nodes[-1].held[engine] = next(self._epoch)

    def evict(self, blocks_max: int) -> None:
        """Drop each engine's oldest leaves until it has at most so many blocks."""
        over = {engine for engine, blocks in self.blocks.items() if blocks > blocks_max}
        order = itertools.count()
        leaves: list[tuple[int, int, int, Node]] = [
            (age, next(order), engine, node)
            for node in (self._tree.nodes() if over else ())
            for engine, age in node.held.items()
            if engine in over and node.is_leaf_of(engine)
        ]
        heapq.heapify(leaves)
        while leaves:
            _, _, engine, node = heapq.heappop(leaves)
            if self.blocks[engine] <= blocks_max:
                continue
            del node.held[engine]
            self.blocks[engine] -= len(node.run)
            above = node.parent
            self._tree.prune(node)
            if above is not None and engine in above.held and above.is_leaf_of(engine):
                heapq.heappush(leaves, (above.held[engine], next(order), engine, above))

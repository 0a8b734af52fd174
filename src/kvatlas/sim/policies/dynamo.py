"""``dynamo``: the cost function of NVIDIA Dynamo's KV router."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence

from kvatlas.indexer import Indexer
from kvatlas.results import Query
from kvatlas.route.outcome import End
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.policies.block_tree import BlockTree
from kvatlas.sim.policies.indexing import make_indexer
from kvatlas.sim.policies.light import InFlight
from kvatlas.sim.policies.policy import MODEL, Surroundings, engine_name
from kvatlas.sim.request import Request


class ActiveBlocks:
    """Blocks of the prompts that are in flight, each counted once an engine."""

    def __init__(self) -> None:
        self._tree = BlockTree()
        self.counts: dict[int, int] = {}
        """Blocks, by engine."""

    def shared(self, keys: Sequence[int]) -> dict[int, int]:
        """Return how many of a prompt's blocks are in flight already, for the engines where any is."""
        blocks: dict[int, int] = {}
        for node, shared in self._tree.match(keys):
            for engine in node.held:
                blocks[engine] = blocks.get(engine, 0) + shared
        return blocks

    def add(self, engine: int, keys: array[int]) -> None:
        for node in self._tree.grow(keys, engine):
            before = node.held.get(engine, 0)
            if not before:
                self.counts[engine] += len(node.run)
            node.held[engine] = before + 1

    def remove(self, engine: int, keys: array[int]) -> None:
        """``keys``: as they were added."""
        for node, _ in reversed(list(self._tree.match(keys))):
            node.held[engine] -= 1
            if not node.held[engine]:
                del node.held[engine]
                self.counts[engine] -= len(node.run)
                self._tree.prune(node)


class Dynamo(InFlight):
    """The least cost; of equal ones, anyone.

        cost = prefill_load_scale * max(0, prefill_tokens / block_size - overlap_score_credit * cached_blocks) + decode_blocks
        prefill_tokens: those of the prompts at the engine without a first token that it did not have, and all of this one
        cached_blocks:  of this prompt, as events tell of the engine
        decode_blocks:  of all prompts in flight at the engine and this one, each block once

    With ``router_temperature`` above 0 it is drawn from the softmax of the costs, which are scaled to their range.

    Source: ai-dynamo/dynamo, lib/kv-router/src/scheduling/selector.rs (01690d4), defaults of config.rs (0243c51), blocks in
    flight of lib/kv-router/src/sequences. docs/router/kv_cache_routing.md (1148bfb) has the older form with the same default:
    ``overlap_score_weight * prefill_blocks + decode_blocks``. Left out: its queue in front of engines with very long backlogs
    (``router_queue_threshold``), lower tiers' credits, and what several routers tell each other.
    """

    name = "dynamo"

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        overlap_score_credit: float = 1.0,
        prefill_load_scale: float = 1.0,
        router_temperature: float = 0.0,
    ) -> None:
        super().__init__(surroundings)
        self._size = surroundings.block_size_tokens
        self._credit = overlap_score_credit
        self._scale = prefill_load_scale
        self._temperature = router_temperature
        self._index: Indexer = make_indexer(surroundings)
        self.indexer = self._index
        self._active = ActiveBlocks()
        self._prefill_tokens: dict[int, int] = {}
        self._prefilling: dict[int, int] = {}
        """Tokens to compute, by request without a first token."""

    def joins(self, engine: int, spec: EngineSpec) -> None:
        super().joins(engine, spec)
        self._active.counts[engine] = 0
        self._prefill_tokens[engine] = 0

    def leaves(self, engine: int) -> None:
        super().leaves(engine)
        del self._active.counts[engine], self._prefill_tokens[engine]

    def pick(self, request: Request) -> int:
        keys, tokens = request.keys[: request.prompt_blocks], request.arrival.prompt_tokens
        cached = self._cached_blocks(request)
        engine = draw(self.costs(keys, tokens, cached), self._temperature, self.random)
        missing = max(0, tokens - cached.get(engine, 0) * self._size)
        self._active.add(engine, keys)
        self._prefill_tokens[engine] += missing
        self._prefilling[request.id] = missing
        return engine

    def costs(self, keys: Sequence[int], prompt_tokens: int, cached_blocks: Mapping[int, int]) -> dict[int, float]:
        """Return what a prompt costs each engine, in blocks."""
        shared = self._active.shared(keys)
        costs = {}
        for engine in self.engines:
            prefill_blocks = (self._prefill_tokens[engine] + prompt_tokens) / self._size
            adjusted = max(0.0, prefill_blocks - self._credit * cached_blocks.get(engine, 0))
            decode_blocks = self._active.counts[engine] + len(keys) - shared.get(engine, 0)
            costs[engine] = self._scale * adjusted + decode_blocks
        return costs

    def first_token(self, request: Request, at_s: float) -> None:
        self._prefill_tokens[request.engine] -= self._prefilling.pop(request.id, 0)

    def ended(self, request: Request, at_s: float, end: End) -> None:
        super().ended(request, at_s, end)
        self.first_token(request, at_s)
        self._active.remove(request.engine, request.keys[: request.prompt_blocks])

    def _cached_blocks(self, request: Request) -> dict[int, int]:
        rows = self._index.match(Query(request.prompt, MODEL, scorer="longest-prefix")).streams
        blocks = {row.stream.pod: row.matched_blocks for row in rows}
        return {engine: blocks.get(engine_name(engine), 0) for engine in self.engines}  # type: ignore[call-overload]


def draw(costs: Mapping[int, float], temperature: float, random: random.Random) -> int:
    """Return an engine of low cost."""
    least, most = min(costs.values()), max(costs.values())
    if temperature == 0.0:
        best = [engine for engine, cost in costs.items() if cost == least]
        return best[0] if len(best) == 1 else best[int(random.random() * len(best))]
    scale = (most - least) * temperature or 1.0
    weights = [math.exp((least - cost) / scale) for cost in costs.values()]
    return random.choices(list(costs), weights)[0]

"""``approx-prefix-cache-producer``: prefixes from the router's own history. Needs no events, and without tokens a text does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.config.quantities import SIZE_FORMS, parse_size
from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import Load
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import Services
from kvatlas.route.prefix.hashes import HashedPrompt, hash_prompt
from kvatlas.route.prefix.history import HistoryStats
from kvatlas.route.prefix.native import make_history
from kvatlas.route.request import RouteRequest

BLOCK_SIZE_TOKENS_MIN = 64
"""Smaller ones are taken for this: each costs an entry for every endpoint that it was routed to. Source: llm-d-router#1158."""
LRU_CAPACITY_BLOCKS = 31_250
BYTES_MAX = "256MiB"
HISTORY = "history"
"""What chains that routers tell each other are of: blocks as they are hashed here."""

_Count = Annotated[int, Meta(ge=0)]


class ApproximatePrefixCache:
    """Takes what was sent to an endpoint before for what it holds. Source: llm-d-router, approx-prefix-cache-producer."""

    class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
        auto_tune: bool = True
        """Take as much for cached as fits an endpoint's GPU blocks, where it says how many it has."""
        block_size_tokens: _Count = 16
        """At least 64 is used. It stays what it is whatever engines report: another size would make all history worthless."""
        block_size: _Count = 0
        """llm-d's old name of block_size_tokens, taken where that has its default."""
        max_prefix_tokens_to_match: _Count = 131_072
        max_prefix_blocks_to_match: _Count = 2048
        """Counts where max_prefix_tokens_to_match is 0; both 0: all of a prompt is matched."""
        lru_capacity_per_server: _Count = LRU_CAPACITY_BLOCKS
        """Blocks of an endpoint that does not say how many it has, or without auto_tune; 0 is the default."""
        history_bytes_max: int | str = BYTES_MAX
        """Of all endpoints together; not in llm-d."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError for a bound below one block, and for a size that is none."""
        self.name = name
        self._kept = f"{name} hashes"
        given = parameters.block_size_tokens
        if given == 16 and parameters.block_size:
            given = parameters.block_size
        self.block_size_tokens = max(BLOCK_SIZE_TOKENS_MIN, given)
        self._blocks_max = _blocks_max(name, parameters, self.block_size_tokens)
        self._auto_tune = parameters.auto_tune
        self._capacity_blocks = parameters.lru_capacity_per_server or LRU_CAPACITY_BLOCKS
        try:
            bytes_max = parse_size(parameters.history_bytes_max)
        except ValueError as error:
            raise ConfigError(f"{name}.historyBytesMax", str(error), SIZE_FORMS) from None
        self._natively = services.index is None or services.index.config.index.core != "reference"
        self._history = make_history(bytes_max, natively=self._natively)
        self._pool: dict[EndpointName, str] = {}
        """Addresses, by name."""

    def produce(self, cycle: Cycle) -> None:
        self.remember(cycle)
        found = self.find(cycle)
        if found is None:
            cycle.notes.append(f"{self.name}: neither tokens nor text of the prompt are known, nothing is matched")
        else:
            cycle.matches[self.name] = found

    def remember(self, cycle: Cycle) -> None:
        """Hash the prompt: what is kept of it is recorded once it is decided, and found."""
        prompt = self._hashed(cycle.request)
        if prompt is not None:
            cycle.kept[self._kept] = prompt

    def find(self, cycle: Cycle) -> PrefixMatches | None:
        """Return what candidates were sent of a remembered prompt; None where neither its tokens nor its text are known."""
        prompt: HashedPrompt | None = cycle.kept.get(self._kept)
        if prompt is None:
            return None
        routed = self._history.match(prompt.hashes)
        matches = {blocks: PrefixMatch(prompt.tokens(blocks), MatchSource.HISTORY) for blocks in set(routed.values())}
        found = {
            candidate.endpoint.name: matches[blocks]
            for candidate in cycle.candidates
            if (blocks := routed.get(candidate.endpoint.name))
        }
        return PrefixMatches(found, self.block_size_tokens, self._blocks(cycle.request, prompt))

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        prompt: HashedPrompt | None = cycle.kept.get(self._kept)
        if prompt is None:
            return
        names = {decision.target.name, decision.computes_prompt.name}
        for candidate in cycle.candidates:
            if candidate.name in names:
                self._history.record(candidate.name, prompt.hashes, self._capacity(candidate.load))

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        """A request that ended well elsewhere than decided (a retry) is history there too."""
        if outcome.end is not End.DONE or endpoint == decision.target.name or endpoint not in self._pool:
            return
        prompt = self._hashed(decision.request)
        if prompt is not None:
            self._history.record(endpoint, prompt.hashes, self._capacity_blocks)

    def told(self, cycle: Cycle) -> dict[str, Sequence[int]]:
        prompt: HashedPrompt | None = cycle.kept.get(self._kept)
        return {} if prompt is None else {HISTORY: prompt.hashes}

    def learn(self, kind: str, candidates: Sequence[Candidate], chain: Sequence[int], now_s: float) -> None:
        for candidate in candidates if kind == HISTORY else ():
            self._history.record(candidate.name, chain, self._capacity(candidate.load))

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        """Forget endpoints that left, and those with another address than before: another process, whose cache is empty."""
        before = self._pool
        self._pool = {endpoint.name: endpoint.authority for endpoint in endpoints}
        self._history.keep({name for name, address in self._pool.items() if before.get(name, address) == address})

    def stats(self) -> HistoryStats:
        return self._history.stats()

    def _hashed(self, request: RouteRequest) -> HashedPrompt | None:
        return hash_prompt(request, self.block_size_tokens, self._blocks_max, natively=self._natively)

    def _blocks(self, request: RouteRequest, prompt: HashedPrompt) -> int:
        """Return how many blocks could have been matched; where only the first tokens are known, by the estimated length."""
        tokens = prompt.tokens(len(prompt.hashes))
        if request.token_ids is not None and not request.tokens_complete:
            bound = request.prompt_tokens if self._blocks_max is None else self._blocks_max * self.block_size_tokens
            tokens = max(tokens, min(request.prompt_tokens, bound))
        return -(-tokens // self.block_size_tokens)

    def _capacity(self, load: Load) -> int:
        report = load.report
        if self._auto_tune and report is not None and report.gpu_blocks and report.block_size_tokens:
            return max(1, report.gpu_blocks * report.block_size_tokens // self.block_size_tokens)
        return self._capacity_blocks


def _blocks_max(name: str, parameters: ApproximatePrefixCache.Parameters, block_size_tokens: int) -> int | None:
    tokens_max = parameters.max_prefix_tokens_to_match
    if tokens_max >= block_size_tokens:
        return tokens_max // block_size_tokens
    if tokens_max:
        problem = f"{tokens_max} is less than a block, and would match nothing"
        raise ConfigError(f"{name}.maxPrefixTokensToMatch", problem, f"0 (no bound), or at least {block_size_tokens}")
    return parameters.max_prefix_blocks_to_match or None

"""``burst-prefix-cache-producer``: requests with one prompt that come at once go to one endpoint, before any cache can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.plugins import Services
from kvatlas.route.prefix.hashes import hash_prompt

UNLIMITED = -1
PREFIX_BLOCKS_MAX = 2048
"""Prompts that are equal so far are one, where maxPrefixTokensToMatch is 0."""
WINDOW_BLOCKS_MAX = 250_000
"""Blocks of all prompts of a window, about 25 MB: 16 million tokens."""
SHARE_MIN = 2
"""While a window is open its size is not known: two such requests are an endpoint's fair share however few have come."""


class BurstPrefixCacheProducer:
    """Steers a request to where an equal one went in the same window: a full match there, none elsewhere.

    A window opens with a request and lasts ``window_duration_ms``. Of equal prompts (up to the longest prefix that is matched)
    the first one goes where the other plugins send it; the next ones go there too, up to ``max_per_replica``, then to the least
    loaded. With ``min_colocate_blocks`` a prompt that has so many leading blocks in common with another one goes there as well,
    as long as the endpoint has less than its fair share of the window; above that, to the least loaded. Load is what the window
    sent, then running requests, then the name. A prompt that has nothing in common with others matches nowhere.

    No request waits: llm-d holds all until the window ends and places them together, which costs each up to 100 ms. So here the
    first of a burst is not steered, and the fair share is that of the requests so far.

    A match may not be computed yet: it is all speculative. List the plugin behind the producers that know, and let a
    prefix-cache-scorer name it. Source: llm-d-router, burst-prefix-cache-producer.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        window_duration_ms: Annotated[int, msgspec.Meta(gt=0, le=10_000)] = 100
        max_per_replica: int = UNLIMITED
        """Requests of one prompt on one endpoint; -1: any number."""
        block_size_tokens: Annotated[int, msgspec.Meta(gt=0)] = 64
        max_prefix_tokens_to_match: Annotated[int, msgspec.Meta(ge=0)] = 0
        """0: 2048 blocks."""
        min_colocate_blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
        """0: only equal prompts are steered."""
        max_batch_size: int = 1000
        """Requests of one window; further ones are not steered. -1: any number, up to 250,000 blocks."""
        balance_by: Literal["requests", "tokens"] = "requests"
        """What load is counted in: requests, or blocks that are not at the endpoint yet."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError for bounds that would let nothing through."""
        for field, value in (("maxPerReplica", parameters.max_per_replica), ("maxBatchSize", parameters.max_batch_size)):
            if value != UNLIMITED and value < 1:
                raise ConfigError(f"{name}.{field}", f"{value} would steer nothing", "-1 (any number), or 1 or more")
        tokens_max = parameters.max_prefix_tokens_to_match
        if 0 < tokens_max < parameters.block_size_tokens:
            problem = f"{tokens_max} is less than a block, and would match nothing"
            raise ConfigError(
                f"{name}.maxPrefixTokensToMatch", problem, f"0 (2048 blocks), or at least {parameters.block_size_tokens}"
            )
        self.name = name
        self._parameters = parameters
        self._blocks_max = tokens_max // parameters.block_size_tokens or PREFIX_BLOCKS_MAX
        self._window = Window(parameters)
        self._closes_s = 0.0

    def produce(self, cycle: Cycle) -> None:
        prompt = hash_prompt(cycle.request, self._parameters.block_size_tokens, self._blocks_max)
        if prompt is None or not prompt.hashes:
            return
        if cycle.now_s >= self._closes_s:
            self._window = Window(self._parameters)
            self._closes_s = cycle.now_s + self._parameters.window_duration_ms / 1000
        if self._window.full:
            cycle.notes.append(f"{self.name}: the window has {self._window.requests} requests, no more are steered")
            return
        cycle.kept[self.name] = prompt.hashes
        target = self._window.target(prompt.hashes, cycle.candidates)
        tokens = max(1, prompt.tokens(len(prompt.hashes)))
        match = PrefixMatch(tokens, MatchSource.HISTORY, speculative_tokens=tokens)
        size = prompt.block_size_tokens
        cycle.matches[self.name] = PrefixMatches({} if target is None else {target: match}, size, -(-tokens // size))

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        hashes: Sequence[int] | None = cycle.kept.get(self.name)
        if hashes is not None:
            self._window.sent(hashes, decision.computes_prompt.name)


class Window:
    """Where the requests of one window went. Prompts are the hashes of their blocks, each chained to the one before."""

    def __init__(self, parameters: BurstPrefixCacheProducer.Parameters) -> None:
        self._per_endpoint_max = None if parameters.max_per_replica == UNLIMITED else parameters.max_per_replica
        self._requests_max = None if parameters.max_batch_size == UNLIMITED else parameters.max_batch_size
        self._common_min = parameters.min_colocate_blocks
        self._by_tokens = parameters.balance_by == "tokens"
        self.requests = 0
        self._blocks = 0
        self._total = 0
        """What all endpoints' fair shares add up to, in the unit of load."""
        self._groups: dict[int, dict[EndpointName, int]] = {}
        """Requests with one prompt by endpoint, by the prompt's last hash."""
        self._load: dict[EndpointName, int] = {}
        self._holders: dict[int, tuple[EndpointName, ...]] = {}
        """Who was sent a block, by its hash. Kept where it matters: for prefixes in common, and load in blocks."""

    @property
    def full(self) -> bool:
        return self._blocks >= WINDOW_BLOCKS_MAX or (self._requests_max is not None and self.requests >= self._requests_max)

    def target(self, hashes: Sequence[int], candidates: Sequence[Candidate]) -> EndpointName | None:
        """Return where a request should go; None where it has nothing in common with those before it."""
        group = self._groups.get(hashes[-1])
        if group is not None:
            return self._beside_equals(group, candidates)
        return self._beside_similar(hashes, candidates) if self._common_min else None

    def sent(self, hashes: Sequence[int], endpoint: EndpointName) -> None:
        """Note where a request went."""
        new = hashes[-1] not in self._groups
        group = self._groups.setdefault(hashes[-1], {})
        first_here = endpoint not in group
        group[endpoint] = group.get(endpoint, 0) + 1
        self.requests += 1
        self._blocks += len(hashes) if first_here else 0
        cost = (len(hashes) - self._held(hashes).get(endpoint, 0) if first_here else 0) if self._by_tokens else 1
        self._load[endpoint] = self._load.get(endpoint, 0) + cost
        self._total += (len(hashes) if new else 0) if self._by_tokens else 1
        if first_here and (self._common_min or self._by_tokens):
            alone = (endpoint,)
            for block in hashes:
                others = self._holders.get(block)
                if others is None:
                    self._holders[block] = alone
                elif endpoint not in others:
                    self._holders[block] = (*others, endpoint)

    def _beside_equals(self, group: dict[EndpointName, int], candidates: Sequence[Candidate]) -> EndpointName:
        most = self._per_endpoint_max
        there = {one.endpoint.name for one in candidates}
        for name, requests in group.items():
            if name in there and (most is None or requests < most):
                return name
        room = [one for one in candidates if most is None or group.get(one.endpoint.name, 0) < most]
        return self._least_loaded(room or candidates)

    def _beside_similar(self, hashes: Sequence[int], candidates: Sequence[Candidate]) -> EndpointName | None:
        held = {name: blocks for name, blocks in self._held(hashes).items() if blocks >= self._common_min}
        if not held:
            return None
        own = len(hashes) if self._by_tokens else 1
        share = max(SHARE_MIN * own, -(-(self._total + own) // len(candidates)))
        below = [one for one in candidates if self._load.get(one.endpoint.name, 0) < share and one.endpoint.name in held]
        if not below:
            return self._least_loaded(candidates)
        most = max(held[one.endpoint.name] for one in below)
        return self._least_loaded([one for one in below if held[one.endpoint.name] == most])

    def _held(self, hashes: Sequence[int]) -> dict[EndpointName, int]:
        """Return how many leading blocks of a prompt each endpoint was sent."""
        held: dict[EndpointName, int] = {}
        for block in hashes:
            names = self._holders.get(block)
            if names is None:
                break
            for name in names:
                held[name] = held.get(name, 0) + 1
        return held

    def _least_loaded(self, candidates: Sequence[Candidate]) -> EndpointName:
        def load(one: Candidate) -> tuple[int, int, str]:
            report = one.load.report
            return self._load.get(one.endpoint.name, 0), 0 if report is None else report.running, one.endpoint.name

        return min(candidates, key=load).endpoint.name

"""Deciders: whether somebody else than the decoding endpoint computes a prompt, or encodes its images."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvatlas.route.cycle import Cycle
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.plugins import NoParameters, Services


class PrefixBasedPdDecider:
    """Elsewhere, if the decoding endpoint would have to compute at least ``non_cached_tokens`` of the prompt.

    prompt tokens - tokens that it holds >= non_cached_tokens

    Prompts whose prefix no producer could look up stay whole. Source: llm-d-router, prefix-based-pd-decider.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        non_cached_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
        """0: never elsewhere."""
        prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
        """Shorter prompts stay whole. 0: no such bound."""
        prefix_match_info_producer_name: str = ""
        """Whose matches count (ours; llm-d always takes those of approx-prefix-cache-producer)."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self._least_tokens = parameters.non_cached_tokens
        self._prompt_tokens = parameters.prompt_tokens
        self._producer = parameters.prefix_match_info_producer_name or None

    def elsewhere(self, cycle: Cycle, endpoint: Endpoint) -> bool:
        prompt_tokens = cycle.request.prompt_tokens
        if self._least_tokens == 0 or prompt_tokens < max(self._prompt_tokens, self._least_tokens):
            return False
        found = cycle.matches_of(self._producer)
        if found is None:
            cycle.notes.append(f"{self.name}: nothing is known of the prompt's prefix, so its decoder computes it")
            return False
        return prompt_tokens - found.of(endpoint.name).tokens >= self._least_tokens


class AlwaysDisaggPdDecider:
    """Always elsewhere. Source: llm-d-router, always-disagg-pd-decider."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def elsewhere(self, cycle: Cycle, endpoint: Endpoint) -> bool:
        return True


class AlwaysDisaggMultimodalDecider:
    """Elsewhere, if there are images, audio or video. Source: llm-d-router, always-disagg-multimodal-decider."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def elsewhere(self, cycle: Cycle, endpoint: Endpoint) -> bool:
        return bool(cycle.request.multimodal)

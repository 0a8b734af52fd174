"""One request as routing sees it: whatever front door it came through, and whether or not its tokens are known."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import msgspec

from kvatlas.route.endpoint import Endpoint
from kvatlas.types import MultimodalItem


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision depends on."""

    id: str
    """The request's id (``x-request-id``)."""
    model: str
    """As the client named it; an adapter's name where the model is one."""
    lora_name: str | None = None
    token_ids: array[int] | None = None
    """array('I'), as the engine sees them. None: not known, and nothing is matched precisely."""
    tokens_complete: bool = True
    """False: the first tokens only. Matches are lower bounds then, and so is the prompt's length."""
    tokens_problem: str | None = None
    """Why the tokens are not known (a TokenizationReason)."""
    text: str | None = None
    """The prompt as text, for matching by history where tokens are not known: a chat's messages one after the other."""
    prompt_tokens_estimated: int = 0
    """About how many tokens the prompt has, where they are not known."""
    cache_salt: str | None = None
    multimodal: tuple[MultimodalItem, ...] = ()
    headers: Mapping[str, str] = {}
    """By lower-case name; only those that routing looks at."""
    priority: int = 0
    """Of the request's objective; below 0 may be shed."""
    fairness_id: str = ""
    """The tenant that the request counts for."""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    subset: frozenset[str] | None = None
    """Addresses (``ip`` or ``ip:port``) that the gateway allows; None: all, empty: none."""
    if_cached: bool = False
    """``Prefer: if-available``: to be refused where no endpoint holds any of the prompt."""

    def allows(self, endpoint: Endpoint) -> bool:
        """Whether the gateway lets the request go there."""
        return self.subset is None or endpoint.address in self.subset or endpoint.authority in self.subset

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has, as far as is known."""
        known = 0 if self.token_ids is None else len(self.token_ids)
        return known if self.token_ids is not None and self.tokens_complete else max(known, self.prompt_tokens_estimated)

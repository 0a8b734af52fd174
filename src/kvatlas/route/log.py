"""The last decisions and how they went, bounded: where `GET /v1/decisions` and `kvatlas explain` look."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

import msgspec

from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import Outcome

DECISIONS_MAX = 1_000


class Logged:
    """A decision and what became of it."""

    __slots__ = ("decision", "estimated", "moves", "outcome", "ttft_s")

    def __init__(self, decision: Decision, *, estimated: bool = False) -> None:
        self.decision = decision
        self.estimated = estimated
        """Whether the prompt's length is an estimate."""
        self.moves: tuple[EndpointName, ...] = ()
        """Whom it was sent to after the target failed."""
        self.ttft_s: float | None = None
        self.outcome: Outcome | None = None
        """None while the request is on its way."""

    def moved(self, endpoint: EndpointName) -> None:
        self.moves = (*self.moves, endpoint)

    def first_token(self, ttft_s: float) -> None:
        self.ttft_s = ttft_s

    def finished(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if outcome.ttft_s is not None:
            self.ttft_s = outcome.ttft_s


class DecisionLog:
    """Keeps the last ``decisions_max`` decisions, without the tokens and the text of their prompts."""

    def __init__(self, decisions_max: int = DECISIONS_MAX) -> None:
        self._decisions_max = decisions_max
        self._logged: OrderedDict[str, Logged] = OrderedDict()

    def __len__(self) -> int:
        return len(self._logged)

    def add(self, decision: Decision) -> Logged:
        """Keep a decision; the oldest one goes where there are too many. An equal request id replaces the one before."""
        request = decision.request
        lean = msgspec.structs.replace(
            request, token_ids=None, text=None, multimodal=(), prompt_tokens_estimated=request.prompt_tokens
        )
        estimated = request.token_ids is None or not request.tokens_complete
        logged = Logged(msgspec.structs.replace(decision, request=lean), estimated=estimated)
        self._logged[decision.request.id] = logged
        self._logged.move_to_end(decision.request.id)
        if len(self._logged) > self._decisions_max:
            self._logged.popitem(last=False)
        return logged

    def get(self, request_id: str) -> Logged | None:
        return self._logged.get(request_id)

    def last(self, count: int) -> list[Logged]:
        """Return the newest decisions, newest first."""
        return list(islice(reversed(self._logged.values()), count))

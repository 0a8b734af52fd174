"""How busy endpoints are: what engines say of themselves, and what was sent to them and has not come back.

What an engine says is as old as its last scrape; what is in flight is known at once, and only of requests that went through
here, or through routers that tell this one. Scorers see both.
"""

from __future__ import annotations

from collections import deque

import msgspec


class EngineReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an engine said of itself: in its metrics, or in an ORCA response header. None where it did not say."""

    at_s: float
    """When it was read, on the router's clock."""
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    block_size_tokens: int | None = None
    gpu_blocks: int | None = None
    loras_running: frozenset[str] = frozenset()
    loras_waiting: frozenset[str] = frozenset()
    loras_max: int | None = None


class InFlight(msgspec.Struct, frozen=True, gc=False):
    """What was sent to an endpoint from here, or from other routers, and is not finished."""

    requests: int = 0
    tokens: int = 0
    """Prompt tokens of these requests."""
    prefill_requests: int = 0
    """Those without a first token yet."""
    prefill_tokens: int = 0
    """Tokens that these have to compute: prompt less the prefix that was predicted to be cached."""
    prefill_pairs: int = 0
    """Of these tokens, each with each token that it attends to: what attention costs goes by (:func:`attention_pairs`)."""
    first_tokens: int = 0
    """Of the tokens, those of the prompt that was sent first: what is computed now, if prompts are computed in turn."""
    first_pairs: int = 0
    """The same of the pairs."""
    first_since_s: float | None = None
    """Since when it may be computed, on the router's clock: it was sent, or the one before it got its first token.
    None also where other routers' prompts wait there too: which is the first is not known then."""

    @property
    def answering(self) -> int:
        """Requests that got their first token, and go on."""
        return max(0, self.requests - self.prefill_requests)


NOTHING = InFlight()


def attention_pairs(computed_tokens: float, prompt_tokens: float) -> float:
    """Return how many pairs of tokens attention is computed of, where so many of a prompt's tokens are computed, the last ones.

    Each attends to all before it, computed or cached: the mean context, times the tokens.
    """
    return computed_tokens * (prompt_tokens - computed_tokens / 2)


class Load(msgspec.Struct, frozen=True, gc=False):
    """How busy an endpoint is, as one decision sees it."""

    report: EngineReport | None = None
    """None: it never said anything."""
    in_flight: InFlight = NOTHING
    prefills_reported: int | None = None
    """``in_flight.prefill_requests`` when the report came: what it is to be compared with. None: as many as now."""

    def report_within(self, now_s: float, age_s_max: float) -> EngineReport | None:
        """Return what the engine said, unless that is too old to go by."""
        return self.report if self.report is not None and now_s - self.report.at_s <= age_s_max else None


class LoadBook:
    """The load of every endpoint. Not thread-safe: the router calls it under its lock."""

    def __init__(self) -> None:
        self._loads: dict[str, _Entry] = {}

    def of(self, endpoint: str) -> Load:
        """Return an endpoint's load; an empty one where nothing is known."""
        entry = self._loads.get(endpoint)
        if entry is None:
            return _IDLE
        return entry.load() if entry.made is None else entry.made

    def report(self, endpoint: str, report: EngineReport) -> None:
        """Note what an engine said. Older than what is known: not taken."""
        entry = self._entry(endpoint)
        if entry.report is None or report.at_s >= entry.report.at_s:
            entry.report = report
            entry.prefills_reported = len(entry.prefills) + entry.others.prefill_requests
            entry.made = None

    def began(self, endpoint: str, tokens: int) -> None:
        """Note a request that is sent, of so many prompt tokens."""
        self._entry(endpoint).add(1, tokens)

    def ended(self, endpoint: str, tokens: int) -> None:
        """Note that it came back. ``tokens``: as given to :meth:`began`."""
        if (entry := self._loads.get(endpoint)) is not None:
            entry.add(-1, -tokens)

    def prefill_began(self, endpoint: str, tokens: int, pairs: int, now_s: float) -> None:
        """Note a prompt of which so many tokens have to be computed, and their ``attention_pairs``."""
        self._entry(endpoint).prefill_began(tokens, pairs, now_s)

    def prefill_ended(self, endpoint: str, tokens: int, pairs: int, now_s: float) -> None:
        """Note that they are. ``tokens`` and ``pairs``: as given to :meth:`prefill_began`."""
        if (entry := self._loads.get(endpoint)) is not None:
            entry.prefill_ended(tokens, pairs, now_s)

    def own(self, endpoint: str) -> InFlight:
        """Return what was sent there from here."""
        entry = self._loads.get(endpoint)
        return NOTHING if entry is None else entry.own()

    def others(self, endpoint: str, in_flight: InFlight) -> None:
        """Note what all other routers together have in flight there, in place of what was noted before."""
        entry = self._entry(endpoint)
        if entry.others != in_flight:
            entry.others = in_flight
            entry.made = None

    def forget(self, endpoint: str) -> None:
        """Drop an endpoint; what is in flight there is taken as ended."""
        self._loads.pop(endpoint, None)

    def _entry(self, endpoint: str) -> _Entry:
        entry = self._loads.get(endpoint)
        if entry is None:
            entry = self._loads[endpoint] = _Entry()
        return entry


class _Entry:
    __slots__ = (
        "first_since_s",
        "made",
        "others",
        "prefill_pairs",
        "prefill_tokens",
        "prefills",
        "prefills_reported",
        "report",
        "requests",
        "tokens",
    )

    def __init__(self) -> None:
        self.report: EngineReport | None = None
        self.prefills_reported: int | None = None
        self.others = NOTHING
        self.requests = 0
        self.tokens = 0
        self.prefills: deque[tuple[int, int]] = deque()
        """Tokens and pairs of each prompt without a first token, in the order of sending. As many as there are requests in
        flight."""
        self.prefill_tokens = 0
        self.prefill_pairs = 0
        self.first_since_s: float | None = None
        self.made: Load | None = None
        """What :meth:`load` returned last, as long as it is true."""

    def add(self, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens
        if self.requests < 0 or self.tokens < 0:  # an endpoint that was forgotten and came back
            self.requests, self.tokens = max(0, self.requests), max(0, self.tokens)
        self.made = None

    def prefill_began(self, tokens: int, pairs: int, now_s: float) -> None:
        if not self.prefills:
            self.first_since_s = now_s
        self.prefills.append((tokens, pairs))
        self.prefill_tokens += tokens
        self.prefill_pairs += pairs
        self.made = None

    def prefill_ended(self, tokens: int, pairs: int, now_s: float) -> None:
        try:
            self.prefills.remove((tokens, pairs))  # of equal ones it does not matter which
        except ValueError:
            return  # of an endpoint that was forgotten and came back
        self.prefill_tokens -= tokens
        self.prefill_pairs -= pairs
        self.first_since_s = now_s if self.prefills else None
        self.made = None

    def load(self) -> Load:
        in_flight = self.own() if self.others is NOTHING else self._all()
        self.made = made = Load(self.report, in_flight, self.prefills_reported)
        return made

    def own(self) -> InFlight:
        prefills = self.prefills
        first_tokens, first_pairs = prefills[0] if prefills else (0, 0)
        return InFlight(
            self.requests,
            self.tokens,
            len(prefills),
            self.prefill_tokens,
            self.prefill_pairs,
            first_tokens,
            first_pairs,
            self.first_since_s,
        )

    def _all(self) -> InFlight:
        own, others = self.own(), self.others
        return InFlight(
            own.requests + others.requests,
            own.tokens + others.tokens,
            own.prefill_requests + others.prefill_requests,
            own.prefill_tokens + others.prefill_tokens,
            own.prefill_pairs + others.prefill_pairs,
            *((own.first_tokens, own.first_pairs, own.first_since_s) if not others.prefill_requests else ()),
        )


_IDLE = Load()

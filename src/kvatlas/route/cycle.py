"""One decision on its way through the plugins: what they read, and what they leave for each other."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec

from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.latency import LatencyPrediction
from kvatlas.route.load import Load
from kvatlas.route.matches import NO_MATCH, PrefixMatch, PrefixMatches
from kvatlas.route.request import RouteRequest


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An endpoint with its load at the time of the decision."""

    endpoint: Endpoint
    load: Load

    @property
    def name(self) -> EndpointName:
        return self.endpoint.name


class Cycle:
    """What one decision works on. Plugins keep nothing of it beyond the decision."""

    __slots__ = ("candidates", "kept", "latencies", "matches", "notes", "now_s", "random", "request", "saturated")

    def __init__(self, request: RouteRequest, candidates: tuple[Candidate, ...], now_s: float, random: random.Random) -> None:
        self.request = request
        self.candidates = candidates
        """All of them, before any filter."""
        self.now_s = now_s
        self.random = random
        self.matches: dict[str, PrefixMatches] = {}
        """By the name of the producer that found them, in the order in which producers ran."""
        self.latencies: dict[str, Mapping[EndpointName, LatencyPrediction]] = {}
        """By the name of the producer that predicted them."""
        self.notes: list[str] = []
        """What a person who reads the decision should know: a degraded mode, a rule that took effect."""
        self.saturated = False
        """A filter left nobody because all were busy: the client should come again (429), not take the service for down."""
        self.kept: dict[str, Any] = {}
        """What a plugin keeps from one of its methods to the next, by the plugin's name."""

    def matches_of(self, producer: str | None = None) -> PrefixMatches | None:
        """Return what a producer found, by default the first one that found anything; None where none did its work."""
        if producer is not None:
            return self.matches.get(producer)
        return next(iter(self.matches.values()), None)

    def latencies_of(self, producer: str | None = None) -> Mapping[EndpointName, LatencyPrediction] | None:
        """Return what a producer predicted, by default the first one that predicted anything; None where none did."""
        if producer is not None:
            return self.latencies.get(producer)
        return next(iter(self.latencies.values()), None)

    def match(self, endpoint: EndpointName, producer: str | None = None) -> PrefixMatch:
        """Return what an endpoint holds of the prompt."""
        found = self.matches_of(producer)
        return NO_MATCH if found is None else found.of(endpoint)

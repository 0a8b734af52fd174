"""Small values that tests of plugins need."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import ProfileRun
from kvatlas.route.endpoint import ROLE_LABEL, Endpoint, EndpointName
from kvatlas.route.load import InFlight, Load
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.plugins import Services
from kvatlas.route.request import RouteRequest
from kvatlas.types import PodId


def candidate(name: str, *, role: str | None = None, labels: Mapping[str, str] | None = None, requests: int = 0) -> Candidate:
    found = dict(labels or {}) | ({} if role is None else {ROLE_LABEL: role})
    endpoint = Endpoint(
        name=EndpointName(name), address=f"10.0.0.{ord(name[0]) - 96}", port=8000, pod=PodId(name), labels=found
    )
    return Candidate(endpoint, Load(in_flight=InFlight(requests=requests)))


def cycle(candidates: Sequence[Candidate] = (), *, tokens: int = 64, seed: int = 1, **more: object) -> Cycle:
    request = RouteRequest(id="r", model="m", token_ids=array("I", range(tokens)), **more)  # type: ignore[arg-type]
    return Cycle(request, tuple(candidates), 100.0, random.Random(seed))


def held(block_size_tokens: int = 16, **tokens: int) -> PrefixMatches:
    """Return what endpoints hold, by name."""
    found = {EndpointName(name): PrefixMatch(count, MatchSource.EVENTS) for name, count in tokens.items()}
    return PrefixMatches(found, block_size_tokens, 4)


def run(profile: str, *picked: str) -> ProfileRun:
    chosen = tuple(candidate(name) for name in picked)
    return ProfileRun(profile=profile, candidates=chosen, dropped=(), ratings=(), totals=(0.0,) * len(chosen), picked=chosen)


def services(**plugins: object) -> Services:
    def plugin(name: str) -> object:
        if name not in plugins:
            raise ConfigError("plugins", f"no {name}", ", ".join(plugins))
        return plugins[name]

    return Services(plugin=plugin, clock=lambda: 100.0, random=random.Random(1))

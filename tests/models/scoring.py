"""What scorers work on, made by hand: candidates with any load, cycles with any matches, plugins with parameters as in YAML."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.latency import LatencyPrediction
from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.plugins import Services
from kvatlas.route.request import RouteRequest
from kvatlas.types import PodId


class NamedProducer:
    """A producer that a parameter may name; it finds nothing."""

    def produce(self, cycle: Cycle) -> None:
        pass


def plugin(type_: Callable[..., Any], parameters: Mapping[str, object] | None = None, name: str = "plugin") -> Any:
    """Make a plugin as a configuration would. The only other plugin is a producer, ``precise``."""

    def found(asked: str) -> object:
        if asked != "precise":
            raise ConfigError("plugins", f"there is no plugin {asked}", "precise")
        return NamedProducer()

    services = Services(plugin=found, clock=lambda: 0.0, random=random.Random(1))
    return type_(name, msgspec.convert(parameters or {}, type_.Parameters), services)  # type: ignore[attr-defined]


def candidate(
    name: str,
    *,
    labels: Mapping[str, str] = {},
    requests: int = 0,
    prefill_tokens: int = 0,
    reported: bool = True,
    **report: Any,
) -> Candidate:
    """``reported`` False: the engine never said anything."""
    endpoint = Endpoint(name=EndpointName(name), address="10.0.0.1", port=8000, labels=labels, pod=PodId(name))
    in_flight = InFlight(requests=requests, tokens=prefill_tokens, prefill_requests=requests, prefill_tokens=prefill_tokens)
    return Candidate(endpoint, Load(EngineReport(at_s=0.0, **report) if reported else None, in_flight))


def cycle(
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int = 0,
    held: Mapping[str, int] | None = None,
    block_size_tokens: int = 16,
    blocks: int = 10,
    ttfts_s: Mapping[str, float] | None = None,
    now_s: float = 0.0,
    seed: int = 1,
    **request: Any,
) -> Cycle:
    """``held``: tokens by endpoint, None where no producer ran; ``ttfts_s``: predictions, the same."""
    tokens = array("I", range(prompt_tokens))
    asked = RouteRequest(**{"id": "r", "model": "m", "token_ids": tokens, **request})
    made = Cycle(asked, tuple(candidates), now_s, random.Random(seed))
    if held is not None:
        matches = {EndpointName(name): PrefixMatch(tokens, MatchSource.EVENTS) for name, tokens in held.items()}
        made.matches["precise"] = PrefixMatches(matches, block_size_tokens, blocks)
    if ttfts_s is not None:
        made.latencies["predictor"] = {EndpointName(name): LatencyPrediction(ttft_s) for name, ttft_s in ttfts_s.items()}
    return made


def decide(
    cycle: Cycle, target: Candidate, *, prefill: Candidate | None = None, profiles: Mapping[str, Candidate] = {}
) -> Decision:
    """Decide for ``target``. ``profiles``: whom further profiles picked, by their names."""
    runs = {"default": target, **profiles}
    return Decision(
        request=cycle.request,
        at_s=0.0,
        targets=(target.endpoint,),
        prefill=None if prefill is None else prefill.endpoint,
        runs={name: _run(name, picked) for name, picked in runs.items()},
        matches=cycle.matches,
    )


def _run(profile: str, picked: Candidate) -> ProfileRun:
    return ProfileRun(profile=profile, candidates=(picked,), dropped=(), ratings=(), totals=(0.0,), picked=(picked,))

"""What plugins do, as Protocols of one or two methods; and how they are found by name.

A plugin type is a class with a ``Parameters`` struct that is called with its name in the configuration, its parameters and the
services that it may use. Types are found through entry points (group ``kvatlas.route``), by the name that llm-d has for them.
One plugin may do several of the things below. All methods are called under the router's lock, must not wait, and must not keep
the cycle.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.endpoint import Endpoint, EndpointName

if TYPE_CHECKING:
    from kvatlas.indexer import Indexer
    from kvatlas.route.decision import Decision, ProfileRun
    from kvatlas.route.outcome import Outcome
    from kvatlas.route.profile import Profile

GROUP = "kvatlas.route"


class NoParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a plugin that has none."""


class Services(msgspec.Struct, frozen=True):
    """What plugins may use beyond the cycle."""

    plugin: Callable[[str], object]
    """Returns the plugin of that name. Raises ConfigError where there is none."""
    clock: Callable[[], float]
    """Seconds that only rise: the clock of ``Cycle.now_s``."""
    random: random.Random
    index: Indexer | None = None
    """The index layer; None where the router runs without one."""


class PluginType(Protocol):
    """A class that plugins are made of."""

    Parameters: ClassVar[type[msgspec.Struct]]
    """Frozen, ``forbid_unknown_fields``, with the names of the configuration (``rename="camel"``)."""

    def __call__(self, name: str, parameters: Any, services: Services) -> object:
        """Return a plugin. Raises ConfigError for parameters that make no sense together."""
        ...


@runtime_checkable
class Producer(Protocol):
    """Finds out what endpoints hold of a prompt, or how long they will take, before profiles run."""

    def produce(self, cycle: Cycle) -> None:
        """Put a PrefixMatches into ``cycle.matches``, or predictions into ``cycle.latencies``, under the plugin's name.

        Where it raises, routing goes on without.
        """
        ...


@runtime_checkable
class Filter(Protocol):
    """Leaves candidates out."""

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return those that stay, in their order."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Rates candidates."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return one number a candidate, in their order; what lies outside of 0 to 1 is clamped.

        Return :class:`ExplainedScores` where there is more to say about them.
        """
        ...


class ExplainedScores(list[float]):
    """Scores that can say what they were made of. They stay with the decision: keep nothing large in them."""

    def parts(self, at: int) -> Mapping[str, float | str]:
        """Return what candidate number ``at`` got its score for; units last. Written out when somebody looks."""
        raise NotImplementedError


@runtime_checkable
class Picker(Protocol):
    """Chooses among candidates by their total scores."""

    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> Sequence[Candidate]:
        """Return the best ones, best first: one at least, since there is one candidate at least."""
        ...


@runtime_checkable
class ProfileHandler(Protocol):
    """Says which profiles run, and which of them chose the target."""

    def next_profiles(
        self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Mapping[str, ProfileRun | None]
    ) -> Sequence[str]:
        """Return the profiles to run next; none ends the decision. ``runs``: those before, None where no candidate was left."""
        ...

    def conclude(self, cycle: Cycle, runs: Mapping[str, ProfileRun | None]) -> Conclusion | None:
        """Return what the runs mean; None where there is nobody to send the request to."""
        ...


class Conclusion(msgspec.Struct, frozen=True):
    """What a decision comes to."""

    primary: str
    """The profile whose pick gets the request."""
    prefill: EndpointName | None = None
    """Who computes the prompt, where that is somebody else."""
    encoders: tuple[EndpointName, ...] = ()


@runtime_checkable
class Decider(Protocol):
    """Says whether a request's prompt (or its images) should be computed elsewhere."""

    def elsewhere(self, cycle: Cycle, endpoint: Endpoint) -> bool:
        """``endpoint``: who will decode."""
        ...


@runtime_checkable
class DecisionObserver(Protocol):
    """Learns of every decision."""

    def decided(self, cycle: Cycle, decision: Decision) -> None: ...


@runtime_checkable
class OutcomeObserver(Protocol):
    """Learns how requests went."""

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        """``endpoint``: who had the request in the end; another one than decided after a retry."""
        ...


@runtime_checkable
class RemembersRoutes(Protocol):
    """Remembers which prompts were sent where, and learns it of those that other routers sent."""

    def told(self, cycle: Cycle) -> Mapping[str, Sequence[int]]:
        """Return the prompt just decided on as chains of 64-bit hashes, by kind: what other routers should learn.

        The beginning of a chain means something without its end.
        """
        ...

    def learn(self, kind: str, candidates: Sequence[Candidate], chain: Sequence[int], now_s: float) -> None:
        """Another router sent the prompt of such a chain to ``candidates``, who are in the pool here too."""
        ...


@runtime_checkable
class Noted(Protocol):
    """Has something to say of its parameters, once, when the router starts."""

    @property
    def notes(self) -> Sequence[str]: ...


@runtime_checkable
class PoolObserver(Protocol):
    """Learns of endpoints that come, change and go."""

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        """``endpoints``: all there are now."""
        ...


@runtime_checkable
class ResponseHeaders(Protocol):
    """Puts headers on responses."""

    def response_headers(self, decision: Decision, endpoint: EndpointName) -> Mapping[str, str]:
        """``endpoint``: who answers; another one than decided after a retry."""
        ...


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """Return what is installed, which costs a look into every package, and does not change while a process runs."""
    return tuple(entry_points(group=GROUP))


def plugin_types() -> dict[str, EntryPoint]:
    """Return every installed plugin type, by name. Loads none."""
    return {point.name: point for point in _installed()}

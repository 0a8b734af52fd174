"""From candidates to a decision: producers, then the profiles that the handler asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from kvatlas.errors import NoEndpointError, SaturatedError
from kvatlas.route.cycle import Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.plugins import Producer, ProfileHandler
from kvatlas.route.profile import Profile

ROUNDS_MAX = 8
"""A handler that goes on asking for profiles is at fault."""


class NamedProducer(msgspec.Struct, frozen=True):
    name: str
    plugin: Producer


class Scheduler:
    """Decides. Holds no state of its own; what it calls may."""

    def __init__(
        self,
        producers: tuple[NamedProducer, ...],
        profiles: Mapping[str, Profile],
        handler: ProfileHandler,
        *,
        failed: Callable[[str, Exception], None],
    ) -> None:
        """``failed``: told of a producer that raised. The request is still routed."""
        self._producers = producers
        self._profiles = dict(profiles)
        self._handler = handler
        self._failed = failed

    def decide(self, cycle: Cycle) -> Decision:
        """Return where the request goes. Raises NoEndpointError where there is nobody, SaturatedError where all are busy."""
        began_s = time.perf_counter()
        if not cycle.candidates:
            raise NoEndpointError("no endpoint is in the pool, or the gateway's subset leaves none")
        for producer in self._producers:
            try:
                producer.plugin.produce(cycle)
            except Exception as error:  # a hint is missing; that is no reason not to route
                cycle.notes.append(f"{producer.name} failed: {type(error).__name__}")
                self._failed(producer.name, error)
        runs = self._run_profiles(cycle)
        conclusion = self._handler.conclude(cycle, runs)
        run = None if conclusion is None else runs.get(conclusion.primary)
        if conclusion is None or run is None:
            if cycle.saturated:
                raise SaturatedError("all endpoints that could take the request are at their limit")
            raise NoEndpointError(_why_nobody(runs))
        others = conclusion.prefill is not None or conclusion.encoders
        endpoints = {one.endpoint.name: one.endpoint for one in cycle.candidates} if others else {}
        return Decision(
            request=cycle.request,
            at_s=time.time(),
            targets=tuple([candidate.endpoint for candidate in run.picked]),
            prefill=None if conclusion.prefill is None else endpoints[conclusion.prefill],
            encoders=tuple([endpoints[name] for name in conclusion.encoders]),
            runs=runs,
            matches=cycle.matches,
            notes=tuple(cycle.notes),
            took_s=time.perf_counter() - began_s,
        )

    def _run_profiles(self, cycle: Cycle) -> dict[str, ProfileRun | None]:
        runs: dict[str, ProfileRun | None] = {}
        for _ in range(ROUNDS_MAX):
            names = self._handler.next_profiles(cycle, self._profiles, runs)
            if not names:
                return runs
            for name in names:
                runs[name] = self._profiles[name].run(cycle, cycle.candidates)
        raise AssertionError(f"the profile handler asked for profiles more than {ROUNDS_MAX} times")


def _why_nobody(runs: Mapping[str, ProfileRun | None]) -> str:
    empty = [name for name, run in runs.items() if run is None]
    if empty:
        return f"the filters of profile {', '.join(empty)} leave no endpoint"
    return "no profile chose an endpoint"

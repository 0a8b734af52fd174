"""From a configuration to a router: plugins are made once, in whatever order they need each other."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.endpoint import ROLE_LABEL, Endpoint, EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.picker_config import Catalog, build_router, read_config
from kvatlas.route.plugins import NoParameters, Services, plugin_types
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.types import PodId
from tests.unit.route.made import held
from tests.unit.route.picker_configs import DISAGGREGATED, KSERVE, PRECISE


class Needs:
    """Asks for another plugin while it is made."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        ref: str = ""
        later: bool = False

    made: ClassVar[list[str]] = []

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.made.append(name)
        self.find = lambda: services.plugin(parameters.ref)
        if parameters.ref and not parameters.later:
            self.found = self.find()


class Holds:
    """A producer that finds the same for every prompt."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def produce(self, cycle: Cycle) -> None:
        cycle.matches[self.name] = held(b=32)


class Grumbles:
    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        raise ConfigError(f"{name}.size", "is too small", "more")


class Same:
    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None: ...

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return [0.5] * len(candidates)


CATALOG = Catalog({**plugin_types(), "needs": Needs, "holds": Holds, "grumbles": Grumbles, "same": Same})


@pytest.fixture(autouse=True)
def _nothing_is_made_yet() -> None:
    Needs.made.clear()


def build(text: str) -> Router:
    return build_router(read_config(text, catalog=CATALOG), catalog=CATALOG, random=random.Random(1), clock=lambda: 100.0)


def endpoint(name: str, role: str | None = None) -> Endpoint:
    labels = {} if role is None else {ROLE_LABEL: role}
    return Endpoint(name=EndpointName(name), address=f"10.0.0.{ord(name) - 96}", port=8000, pod=PodId(name), labels=labels)


def request(id: str = "r", tokens: int = 256) -> RouteRequest:  # noqa: A002
    return RouteRequest(id=id, model="M", token_ids=array("I", range(tokens)))


def test_a_plugin_that_another_needs_is_made_first_and_once() -> None:
    router = build("plugins: [{type: needs, name: a, parameters: {ref: b}}, {type: needs, name: b}]")
    assert Needs.made == ["a", "b"]
    assert router.plugin("a").found is router.plugin("b")  # type: ignore[attr-defined]


def test_plugins_may_find_each_other_once_they_are_made() -> None:
    parameters = "parameters: {ref: %s, later: true}"
    router = build(f"plugins: [{{type: needs, name: a, {parameters % 'b'}}}, {{type: needs, name: b, {parameters % 'a'}}}]")
    assert router.plugin("a").find() is router.plugin("b")  # type: ignore[attr-defined]
    assert router.plugin("b").find() is router.plugin("a")  # type: ignore[attr-defined]


def test_a_circle_is_refused_and_shown() -> None:
    with pytest.raises(ConfigError, match="a -> b -> a"):
        build("plugins: [{type: needs, name: a, parameters: {ref: b}}, {type: needs, name: b, parameters: {ref: a}}]")


def test_a_plugin_that_is_not_there_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError) as raised:
        build("plugins: [{type: queue-scorer}, {type: needs, parameters: {ref: queue-scorrer}}]")
    assert raised.value.path == "plugins[1]"
    assert "queue-scorer" in str(raised.value)


def test_what_a_plugin_says_of_itself_is_said_of_its_place() -> None:
    with pytest.raises(ConfigError) as raised:
        build("plugins: [{type: grumbles}]")
    assert raised.value.path == "plugins[0].parameters.size"


def test_profiles_that_the_handler_cant_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 profiles"):
        build("{plugins: [{type: single-profile-handler}], schedulingProfiles: [{name: a}, {name: b}]}")


def test_weights_and_filters_reach_the_decision() -> None:
    router = build(
        "{plugins: [{type: decode-filter}, {type: same, name: x}, {type: same, name: y}],"
        " schedulingProfiles: [{name: p, plugins: [{pluginRef: decode-filter}, {pluginRef: x, weight: 3}, {pluginRef: y}]}]}"
    )
    router.set_endpoints([endpoint("a"), endpoint("b", "prefill")])
    run = router.decide(request()).decision.runs["p"]
    assert run is not None
    assert [(one.scorer, one.weight) for one in run.ratings] == [("x", 3.0), ("y", 1.0)]
    assert run.totals == (2.0,)
    assert [(one.filter, one.endpoints) for one in run.dropped] == [("decode-filter", ("b",))]


def test_a_producer_runs_if_it_is_configured() -> None:
    router = build("plugins: [{type: holds}, {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: holds}}]")
    router.set_endpoints([endpoint("a"), endpoint("b")])
    decision = router.decide(request()).decision
    assert decision.target.name == "b"
    assert list(decision.matches) == ["holds"]


def test_a_type_that_cant_be_loaded_is_refused() -> None:
    (broken,) = (point for name, point in plugin_types().items() if name == "queue-scorer")
    elsewhere = type(broken)("queue-scorer", "kvatlas.absent:Scorer", broken.group)
    with pytest.raises(ConfigError, match="can't be loaded"):
        read_config("plugins: [{type: queue-scorer}]", catalog=Catalog({"queue-scorer": elsewhere}))


# -- configurations in the wild, with the plugins that are installed ---------------------------------------------------------


def real(text: str) -> Router:
    router = build_router(read_config(text), random=random.Random(1), clock=lambda: 100.0)
    router.set_endpoints([endpoint("a"), endpoint("b"), endpoint("c", "prefill")])
    for name, waiting in (("a", 3), ("b", 0), ("c", 0)):
        router.report(EndpointName(name), EngineReport(at_s=100.0, waiting=waiting))
    return router


@pytest.mark.parametrize(("text", "target"), [(PRECISE, "b"), (DISAGGREGATED, "b"), ("", "bc")])
def test_configs_in_the_wild_route(text: str, target: str) -> None:
    decision = real(text).decide(request()).decision
    assert decision.target.name in target
    assert not [note for note in decision.notes if "failed" in note]


def test_kserves_config_routes() -> None:
    run = real(KSERVE).decide(request()).decision.runs["default"]
    assert run is not None
    assert [rating.scorer for rating in run.ratings] == ["prefix-cache-scorer", "load-aware-scorer"]


def test_the_prefill_decode_config_computes_long_prompts_elsewhere_until_they_are_cached() -> None:
    router = real(DISAGGREGATED)
    first = router.decide(request("1")).decision
    assert first.prefill is not None
    assert (first.target.name, first.prefill.name) == ("b", "c")
    assert list(first.runs) == ["decode", "prefill"]
    again = router.decide(request("2")).decision
    assert (again.target.name, again.prefill) == ("b", None)
    assert router.decide(request("3", tokens=15)).decision.prefill is None

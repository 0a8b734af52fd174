"""The core of routing: profiles choose, decisions say why, and what is in flight counts until it ends."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import NoCachedPrefixError, NoEndpointError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision, ProfileRun
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.handlers import SingleProfileHandler
from kvatlas.route.load import EngineReport, InFlight, LoadBook
from kvatlas.route.log import DecisionLog
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import Conclusion, NoParameters, Services
from kvatlas.route.profile import NamedFilter, Profile, WeightedScorer
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight, Router
from kvatlas.route.scheduler import NamedProducer, Scheduler
from kvatlas.types import PodId

DONE = Outcome(end=End.DONE)
SERVICES = Services(plugin=lambda name: None, clock=lambda: 0.0, random=random.Random(1))


def endpoint(name: str) -> Endpoint:
    return Endpoint(name=EndpointName(name), address=f"10.0.0.{ord(name[0]) - 96}", port=8000, pod=PodId(name))


def request(id: str = "r", tokens: int = 64, **more: object) -> RouteRequest:  # noqa: A002
    return RouteRequest(id=id, model="m", token_ids=array("I", range(tokens)), **more)  # type: ignore[arg-type]


class Fixed:
    """Scores by name."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        return [self.scores.get(candidate.name, 0.0) for candidate in candidates]


class Without:
    def __init__(self, *names: str) -> None:
        self.names = names

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [candidate for candidate in candidates if candidate.name not in self.names]


class Best:
    def pick(self, cycle: Cycle, candidates: Sequence[Candidate], totals: Sequence[float]) -> list[Candidate]:
        return [candidates[max(range(len(totals)), key=totals.__getitem__)]]


class Holds:
    """A producer that knows what endpoints hold, in tokens."""

    def __init__(self, **tokens: int) -> None:
        self.tokens = tokens

    def produce(self, cycle: Cycle) -> None:
        found = {EndpointName(name): PrefixMatch(tokens, MatchSource.EVENTS) for name, tokens in self.tokens.items()}
        cycle.matches["holds"] = PrefixMatches(found, 16, 4)


class Broken:
    def produce(self, cycle: Cycle) -> None:
        raise OSError("the index is gone")


class Split(SingleProfileHandler):
    """The first profile decodes, the second one prefills."""

    def conclude(self, cycle: Cycle, runs: Mapping[str, ProfileRun | None]) -> Conclusion | None:
        decode, prefill = runs.values()
        return Conclusion("decode", prefill=prefill.picked[0].name if prefill and decode else None)


def profile(name: str = "default", *, filters: Sequence[object] = (), **scorers: tuple[object, float]) -> Profile:
    return Profile(
        name,
        tuple(NamedFilter(type(one).__name__, one) for one in filters),  # type: ignore[arg-type]
        tuple(WeightedScorer(scorer, plugin, weight) for scorer, (plugin, weight) in scorers.items()),  # type: ignore[arg-type]
        Best(),
    )


def router(
    *profiles: Profile,
    producers: Sequence[object] = (),
    handler: type[SingleProfileHandler] = SingleProfileHandler,
    plugins: Mapping[str, object] = {},
    healthy: Callable[[str], bool] = lambda _name: True,
) -> Router:
    scheduler = Scheduler(
        tuple(NamedProducer(type(one).__name__, one) for one in producers),  # type: ignore[arg-type]
        {one.name: one for one in profiles or (profile(),)},
        handler("handler", NoParameters(), SERVICES),
        failed=lambda _name, _error: None,
    )
    made = Router(scheduler, plugins, clock=lambda: 100.0, random=random.Random(1), healthy=healthy)
    made.set_endpoints([endpoint(name) for name in "abc"])
    return made


def in_flight(of: Router) -> dict[str, InFlight]:
    return {
        name: of.load(EndpointName(name)).in_flight for name in "abc" if of.load(EndpointName(name)).in_flight != InFlight()
    }


# -- profiles ----------------------------------------------------------------------------------------------------------------


def test_scores_are_clamped_weighted_and_added() -> None:
    made = router(profile(x=(Fixed(a=0.5, b=7.0, c=float("nan")), 2.0), y=(Fixed(a=1.0, b=-3.0), 1.0)))
    run = made.decide(request()).decision.runs["default"]
    assert run is not None
    assert run.totals == (2.0, 2.0, 0.0)
    assert [(rating.scorer, rating.weight, rating.scores) for rating in run.ratings] == [
        ("x", 2.0, (0.5, 1.0, 0.0)),
        ("y", 1.0, (1.0, 0.0, 0.0)),
    ]


def test_a_decision_names_who_was_left_out_and_by_what() -> None:
    run = router(profile(filters=[Without("a"), Without("x"), Without("c")])).decide(request()).decision.runs["default"]
    assert run is not None
    assert [(dropped.filter, dropped.endpoints) for dropped in run.dropped] == [("Without", ("a",)), ("Without", ("c",))]
    assert [candidate.name for candidate in run.picked] == ["b"]


def test_nobody_left_is_an_error_that_names_the_profile() -> None:
    with pytest.raises(NoEndpointError, match="default") as raised:
        router(profile(filters=[Without("a", "b", "c")])).decide(request())
    assert (raised.value.status, raised.value.reason) == (503, "rejected-no-endpoints")


def test_an_empty_pool_and_an_empty_subset_are_errors() -> None:
    made = router()
    for subset in (frozenset[str](), frozenset({"10.9.9.9"})):
        with pytest.raises(NoEndpointError, match="subset"):
            made.decide(request(subset=subset))
    made.set_endpoints([])
    with pytest.raises(NoEndpointError, match="pool"):
        made.decide(request())


def test_a_subset_names_addresses_with_or_without_a_port() -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)))
    assert made.decide(request(subset=frozenset({"10.0.0.2", "10.0.0.3:8000"}))).endpoint in ("b", "c")


def test_who_is_out_of_rotation_gets_nothing_while_others_are_there() -> None:
    down = {"a"}
    made = router(profile(x=(Fixed(a=1.0), 1.0)), healthy=lambda name: name not in down)
    decision = made.decide(request()).decision
    assert decision.target.name != "a"
    assert decision.notes == ("1 of 3 endpoints are out of rotation",)
    down.update("bc")
    assert made.decide(request()).decision.target.name == "a"


# -- producers ---------------------------------------------------------------------------------------------------------------


def test_a_broken_producer_is_noted_and_the_request_is_routed() -> None:
    decision = router(profile(x=(Fixed(b=1.0), 1.0)), producers=[Broken()]).decide(request()).decision
    assert decision.target.name == "b"
    assert decision.notes == ("Broken failed: OSError",)
    assert decision.predicted_cached_tokens is None


def test_the_last_token_is_never_predicted_to_be_cached() -> None:
    decision = router(profile(x=(Fixed(a=1.0), 1.0)), producers=[Holds(a=64, b=32)]).decide(request(tokens=64)).decision
    assert decision.predicted_cached_tokens == 63


def test_a_request_that_wants_a_cached_prefix_is_refused_where_there_is_none() -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)), producers=[Holds(b=32)])
    with pytest.raises(NoCachedPrefixError) as raised:
        made.decide(request(if_cached=True))
    assert raised.value.status == 412
    assert router(producers=[Holds(a=32, b=32, c=32)]).decide(request(if_cached=True))
    assert not in_flight(made)


# -- flights -----------------------------------------------------------------------------------------------------------------


def test_a_request_counts_where_it_is_sent_until_it_ends() -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)), producers=[Holds(a=48)])
    flight = made.decide(request())
    pairs = 48 * 16 + 16 * 16 // 2
    assert in_flight(made) == {"a": InFlight(1, 64, 1, 16, pairs, 16, pairs, 100.0)}
    flight.first_token(0.1)
    assert in_flight(made) == {"a": InFlight(1, 64, 0, 0)}
    flight.first_token(0.2)
    assert flight.finished(DONE)
    assert in_flight(made) == {}
    assert not flight.finished(DONE)


def test_a_preview_decides_alike_and_leaves_no_trace() -> None:
    class Watcher:
        def __init__(self) -> None:
            self.decided_for: list[str] = []

        def decided(self, cycle: Cycle, decision: Decision) -> None:
            self.decided_for.append(decision.target.name)

    one = router(profile(held=(Fixed(a=0.2, b=0.9), 1.0)))
    watcher = Watcher()
    one.watch(watcher)
    seen = one.preview(request())
    assert (seen.target.name, len(one.log), watcher.decided_for) == ("b", 0, [])
    assert in_flight(one) == {}
    assert one.decide(request()).decision.target == seen.target
    assert watcher.decided_for == ["b"]


def test_a_retry_moves_what_counts_and_takes_nothing_to_be_cached_there() -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)), producers=[Holds(a=48)])
    flight = made.decide(request())
    flight.moved(EndpointName("b"))
    assert in_flight(made) == {"b": InFlight(1, 64, 1, 64, 64 * 32, 64, 64 * 32, 100.0)}
    flight.finished(DONE)
    assert in_flight(made) == {}
    logged = made.log.get("r")
    assert logged is not None
    assert (logged.moves, logged.outcome) == (("b",), DONE)


def test_a_prompt_computed_elsewhere_counts_there_until_its_first_token() -> None:
    decode, prefill = profile("decode", x=(Fixed(a=1.0), 1.0)), profile("prefill", x=(Fixed(b=1.0), 1.0))
    made = router(decode, prefill, producers=[Holds(b=48)], handler=Split)
    flight = made.decide(request())
    assert flight.decision.predicted_cached_tokens == 48
    assert in_flight(made) == {"a": InFlight(1, 64, 0, 0), "b": InFlight(1, 64, 1, 16, 896, 16, 896, 100.0)}
    flight.first_token(0.1)
    assert in_flight(made) == {"a": InFlight(1, 64, 0, 0)}
    flight.finished(DONE)
    assert in_flight(made) == {}


def test_an_endpoint_that_goes_takes_its_load_along() -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)))
    flight = made.decide(request())
    made.report(EndpointName("a"), EngineReport(at_s=1.0, waiting=3))
    made.set_endpoints([endpoint("b")])
    made.report(EndpointName("a"), EngineReport(at_s=2.0, waiting=3))
    flight.first_token(0.1)
    flight.finished(DONE)
    made.set_endpoints([endpoint("a")])
    assert made.load(EndpointName("a")).report is None
    assert in_flight(made) == {}


@given(steps=st.lists(st.tuples(st.sampled_from(["send", "first", "move", "end"]), st.integers(0, 5)), max_size=60))
def test_what_is_in_flight_is_nothing_once_all_has_ended(steps: list[tuple[str, int]]) -> None:
    made = router(profile(x=(Fixed(a=1.0), 1.0)), producers=[Holds(a=48)])
    flights: list[Flight] = []
    for step, which in steps:
        if step == "send":
            flights.append(made.decide(request(f"r{len(flights)}")))
        elif flights:
            flight = flights[which % len(flights)]
            match step:
                case "first":
                    flight.first_token(0.1)
                case "move":
                    flight.moved(EndpointName("abc"[which % 3]))
                case "end":
                    flight.finished(DONE)
        counted = in_flight(made).values()
        assert sum(one.requests for one in counted) == len({id(one) for one in flights if not one.ended})
    for flight in flights:
        flight.finished(DONE)
    assert in_flight(made) == {}


# -- observers, reports, the log ---------------------------------------------------------------------------------------------


class Watcher:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        self.seen.append(("decided", decision.target.name))

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        self.seen.append(("finished", endpoint, outcome.cached_tokens))

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        self.seen.append(("pool", tuple(one.name for one in endpoints)))

    def response_headers(self, decision: Decision, endpoint: EndpointName) -> Mapping[str, str]:
        return {"x-session-token": decision.target.name}


def test_plugins_learn_of_decisions_outcomes_and_the_pool() -> None:
    watcher = Watcher()
    made = router(profile(x=(Fixed(c=1.0), 1.0)), plugins={"watcher": watcher})
    flight = made.decide(request())
    flight.moved(EndpointName("a"))
    flight.finished(Outcome(end=End.DONE, cached_tokens=5))
    assert watcher.seen == [("pool", ("a", "b", "c")), ("decided", "c"), ("finished", "a", 5)]
    assert made.response_headers(flight.decision, flight.endpoint) == {"x-session-token": "c"}


def test_an_older_report_does_not_replace_a_newer_one() -> None:
    book = LoadBook()
    book.report("a", EngineReport(at_s=2.0, waiting=2))
    book.report("a", EngineReport(at_s=1.0, waiting=1))
    load = book.of("a")
    assert load.report is not None
    assert load.report.waiting == 2
    assert load.report_within(2.4, 0.5) is load.report
    assert load.report_within(2.6, 0.5) is None


def test_the_first_prompt_is_computed_since_it_was_sent_or_the_one_before_it_got_its_token() -> None:
    book = LoadBook()

    def first() -> tuple[int, int, int, int, float | None]:
        flying = book.of("a").in_flight
        return flying.prefill_tokens, flying.prefill_pairs, flying.first_tokens, flying.first_pairs, flying.first_since_s

    book.prefill_began("a", 500, 70, 1.0)
    book.prefill_began("a", 300, 50, 2.0)
    assert first() == (800, 120, 500, 70, 1.0)
    book.prefill_ended("a", 500, 70, 3.0)
    assert first() == (300, 50, 300, 50, 3.0)
    book.prefill_ended("a", 300, 50, 4.0)
    assert first() == (0, 0, 0, 0, None)
    book.prefill_ended("a", 300, 50, 5.0)
    assert first() == (0, 0, 0, 0, None), "of an endpoint that was forgotten and came back"


def test_a_report_is_kept_with_what_was_in_flight_when_it_came() -> None:
    book = LoadBook()
    book.prefill_began("a", 500, 70, 1.0)
    book.report("a", EngineReport(at_s=1.5))
    book.prefill_began("a", 300, 50, 2.0)
    assert (book.of("a").prefills_reported, book.of("a").in_flight.prefill_requests) == (1, 2)


def test_the_log_keeps_the_last_decisions_without_their_prompts() -> None:
    decision = router().decide(request("r0", text="secret")).decision
    log = DecisionLog(2)
    for number in range(3):
        log.add(_renamed(decision, f"r{number}"))
    log.add(_renamed(decision, "r1"))
    assert [logged.decision.request.id for logged in log.last(10)] == ["r1", "r2"]
    assert (log.get("r0"), len(log)) == (None, 2)
    kept = log.last(1)[0].decision.request
    assert (kept.token_ids, kept.text, kept.prompt_tokens) == (None, None, 64)


def _renamed(decision: Decision, request_id: str) -> Decision:
    renamed = msgspec.structs.replace(decision.request, id=request_id)
    return msgspec.structs.replace(decision, request=renamed)

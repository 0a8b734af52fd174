"""Sessions: later requests go where the first one went, by a header that comes back or by an id that is remembered."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.scorers.session import SessionAffinityFilter, SessionAffinityScorer
from kvatlas.route.scorers.sessions import SessionStore
from tests.models.scoring import candidate, cycle, decide, plugin

A, B, C = candidate("default/a"), candidate("default/b"), candidate("default/c#dp1")
BY_ID = {"strategy": "session_id"}


def token(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def asked(now_s: float = 0.0, **headers: str) -> Cycle:
    return cycle([A, B, C], now_s=now_s, headers={name.replace("_", "-"): value for name, value in headers.items()})


def kept(filter_: SessionAffinityFilter, request: Cycle, candidates: list[Candidate] | None = None) -> list[Candidate]:
    return list(filter_.filter(request, candidates or [A, B, C]))


def decided(affinity: Any, request: Cycle, target: Candidate, candidates: list[Candidate] | None = None) -> Decision:
    """Route a request to ``target``, whatever the plugin prefers."""
    if isinstance(affinity, SessionAffinityFilter):
        kept(affinity, request, candidates)
    else:
        affinity.score(request, candidates or [A, B, C])
    decision = decide(request, target)
    affinity.decided(request, decision)
    return decision


# -- the client carries the endpoint ------------------------------------------------------------------------------------


def test_the_endpoint_that_the_client_names_is_the_best_and_the_only_one() -> None:
    request = asked(x_session_token=token("default/b"))
    assert plugin(SessionAffinityScorer).score(request, [A, B, C]) == [0.0, 1.0, 0.0]
    assert kept(plugin(SessionAffinityFilter), request) == [B]


def test_a_rank_is_an_endpoint_of_its_own() -> None:
    assert kept(plugin(SessionAffinityFilter), asked(x_session_token=token("default/c#dp1"))) == [C]


@pytest.mark.parametrize("value", ["", "no base64!", "é", token("default/gone"), base64.b64encode(b"\xff\xfe").decode(), "AAA"])
def test_a_header_that_names_nobody_here_means_nothing(value: str) -> None:
    request = asked(x_session_token=value)
    assert plugin(SessionAffinityScorer).score(request, [A, B, C]) == [0.0, 0.0, 0.0]
    assert kept(plugin(SessionAffinityFilter), request) == [A, B, C]


@pytest.mark.parametrize("type_", [SessionAffinityScorer, SessionAffinityFilter])
def test_the_response_names_the_endpoint(type_: Any) -> None:
    affinity = plugin(type_)
    headers = affinity.response_headers(decided(affinity, asked(), B), B.name)
    assert headers == {"x-session-token": "ZGVmYXVsdC9i"}
    assert kept(plugin(SessionAffinityFilter), cycle([A, B, C], headers=headers)) == [B]


def test_after_a_retry_the_response_names_who_answered() -> None:
    affinity = plugin(SessionAffinityFilter)
    assert affinity.response_headers(decided(affinity, asked(), A), B.name) == {"x-session-token": token("default/b")}


def test_another_header_may_be_asked_for_in_any_case() -> None:
    affinity = plugin(SessionAffinityFilter, {"encodedEndpointHeaderConfig": {"header": " X-Stick "}})
    assert kept(affinity, asked(x_stick=token("default/a"))) == [A]
    assert list(affinity.response_headers(decided(affinity, asked(), A), A.name)) == ["x-stick"]


def test_another_profiles_pick_may_be_the_sessions_endpoint() -> None:
    affinity = plugin(SessionAffinityScorer, {"profileName": "first"})
    assert affinity.response_headers(decide(asked(), A, profiles={"first": B}), A.name) == {
        "x-session-token": token("default/b")
    }
    assert affinity.response_headers(decide(asked(), A), A.name) == {}


# -- the router remembers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [SessionAffinityScorer, SessionAffinityFilter])
def test_a_session_stays_where_its_first_request_went(type_: Any) -> None:
    affinity = plugin(type_, BY_ID)
    decision = decided(affinity, asked(x_session_id="s"), B)
    assert affinity.response_headers(decision, B.name) == {}
    if type_ is SessionAffinityFilter:
        assert kept(affinity, asked(x_session_id=" s ")) == [B]
        assert kept(affinity, asked(x_session_id="other")) == [A, B, C]
    else:
        assert affinity.score(asked(x_session_id="s"), [A, B, C]) == [0.0, 1.0, 0.0]
        assert affinity.score(asked(x_session_id="other"), [A, B, C]) == [0.0, 0.0, 0.0]


def test_requests_without_an_id_belong_to_no_session() -> None:
    affinity = plugin(SessionAffinityFilter, BY_ID)
    decided(affinity, asked(), B)
    decided(affinity, asked(x_session_id="  "), B)
    assert kept(affinity, asked()) == [A, B, C]


def test_the_first_source_that_yields_something_counts() -> None:
    sources = [{"header": "X-Conversation"}, {"header": "x-user"}]
    affinity = plugin(SessionAffinityFilter, {**BY_ID, "sessionIdConfig": {"sources": sources}})
    decided(affinity, asked(x_conversation="c", x_user="u"), A)
    decided(affinity, asked(x_user="u"), B)
    assert kept(affinity, asked(x_conversation="c", x_user="u")) == [A]
    assert kept(affinity, asked(x_conversation="new", x_user="u")) == [A, B, C]


def test_a_session_moves_where_its_endpoint_is_gone() -> None:
    affinity = plugin(SessionAffinityFilter, BY_ID)
    decided(affinity, asked(x_session_id="s"), B)
    assert kept(affinity, asked(x_session_id="s"), [A, C]) == [A, C]
    decided(affinity, asked(x_session_id="s"), C, [A, C])
    assert kept(affinity, asked(x_session_id="s")) == [C]


def test_a_session_does_not_move_because_others_were_preferred_once() -> None:
    affinity = plugin(SessionAffinityScorer, BY_ID)
    decided(affinity, asked(x_session_id="s"), B)
    decided(affinity, asked(x_session_id="s"), A)
    assert affinity.score(asked(x_session_id="s"), [A, B, C]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("end", "kept_at"), [(End.DONE, C), (End.ENGINE_ERROR, B)])
def test_a_session_moves_with_a_retry_that_went_well(end: End, kept_at: Candidate) -> None:
    affinity = plugin(SessionAffinityFilter, BY_ID)
    decision = decided(affinity, asked(x_session_id="s"), B)
    affinity.finished(decision, C.name, Outcome(end=end))
    assert kept(affinity, asked(x_session_id="s")) == [kept_at]


def test_a_session_that_is_not_used_is_forgotten_after_300_seconds() -> None:
    affinity = plugin(SessionAffinityFilter, BY_ID)
    decided(affinity, asked(0.0, x_session_id="s"), B)
    decided(affinity, asked(250.0, x_session_id="s"), B)
    assert kept(affinity, asked(550.0, x_session_id="s")) == [B]
    assert kept(affinity, asked(550.1, x_session_id="s")) == [A, B, C]


@pytest.mark.parametrize(
    "source", [{}, {"header": " "}, {"attribute": "agent-identity"}, {"header": "x", "attribute": "y", "producer": "z"}]
)
def test_a_source_that_is_no_header_is_refused(source: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"plugin\.sessionIdConfig\.sources\[0\]"):
        plugin(SessionAffinityFilter, {**BY_ID, "sessionIdConfig": {"sources": [source]}})


@pytest.mark.parametrize(
    "parameters", [{"strategy": "cookie"}, {"sessionIdConfig": {"evictionTtlSeconds": 0}}, {"header": "x-session-token"}]
)
def test_parameters_that_mean_nothing_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        plugin(SessionAffinityScorer, parameters)


# -- what is remembered -------------------------------------------------------------------------------------------------


def test_of_too_many_sessions_those_used_longest_ago_go() -> None:
    store = SessionStore(300.0, 10.0, sessions_max=2)
    for session, now_s in (("a", 0.0), ("b", 1.0), ("a", 2.0), ("c", 3.0)):
        store.bind(session, A.name, now_s)
    assert [store.get(session, 3.0) for session in "abc"] == [A.name, None, A.name]


def test_what_expired_is_removed_when_the_sweep_is_due() -> None:
    store = SessionStore(300.0, 10.0)
    for number in range(100):
        store.bind(str(number), A.name, 1000.0)
    store.bind("later", A.name, 1305.0)
    assert len(store) == 1
    store.bind("more", A.name, 1309.0)
    assert len(store) == 2


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 400)), max_size=30), st.integers(1, 5))
def test_it_remembers_no_more_than_it_may_and_nothing_old(uses: list[tuple[str, float]], sessions_max: int) -> None:
    store = SessionStore(300.0, 10.0, sessions_max)
    now_s, used_s = 0.0, dict[str, float]()
    for session, later_s in uses:
        now_s += later_s
        store.bind(session, A.name, now_s)
        used_s.pop(session, None)
        used_s[session] = now_s
        assert len(store) <= sessions_max
    recent = list(used_s)[-sessions_max:]
    for session in "abcde":
        known = session in recent and now_s - used_s[session] <= 300.0
        assert (store.get(session, now_s) is not None) == known
